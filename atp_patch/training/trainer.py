"""transformers' Trainer, which also logs the parts of the loss, distils from the unpruned model,
and writes small checkpoints where only a part of the model learns.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import PrinterCallback, Trainer, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from atp_patch.contract.errors import ATPError, ConfigError, WeightsError
from atp_patch.patching.api import disabled, last_trace
from atp_patch.patching.patch import MODULE_NAME
from atp_patch.tools.parameter_groups import parameter_groups
from atp_patch.training.dataset import SKIPPED
from atp_patch.training.encode import IGNORED
from atp_patch.training.meter import Meter
from atp_patch.training.settings import Settings
from atp_patch.training.zero3 import check_deepspeed, check_launcher, launched_with_deepspeed

LEARNED_FILE = "learned.safetensors"  # in a checkpoint: all that learns, where that is not all


def arguments(settings: Settings, device: torch.device) -> TrainingArguments:
    """Make the Trainer's own settings of ours.

    Args:
        device: its type decides whether a CPU is used; the Trainer chooses among several GPUs.

    Raises:
        ConfigError: where batch_size is no multiple of what all devices take in a pass, or the
            configuration of DeepSpeed or the way it was started is wrong.
    """
    if settings.deepspeed is not None:
        check_launcher()
    with_deepspeed = settings.deepspeed is not None or launched_with_deepspeed()
    make = partial(
        TrainingArguments,
        output_dir=settings.out,
        num_train_epochs=settings.epochs,
        max_steps=-1 if settings.steps is None else settings.steps,
        learning_rate=settings.lr,
        lr_scheduler_type=settings.schedule,
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        max_grad_norm=settings.clip,
        bf16=settings.dtype == "bfloat16",
        # With use_cpu the Trainer would leave DeepSpeed out without a word.
        use_cpu=device.type == "cpu" and not with_deepspeed,
        deepspeed=settings.deepspeed,
        dataloader_num_workers=settings.workers,
        seed=settings.seed,
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        save_steps=settings.save_every,
        save_total_limit=settings.keep,
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    try:
        args: TrainingArguments = make()
    except (ImportError, ValueError, OSError) as error:
        raise ConfigError(f"transformers' Trainer refuses these settings: {error}") from error
    check_deepspeed(args)
    micro = settings.micro_batch_size or max(1, settings.batch_size // args.world_size)
    passes, rest = divmod(settings.batch_size, micro * args.world_size)
    if rest or not passes:
        raise ConfigError(
            f"batch_size {settings.batch_size} is no multiple of micro_batch_size {micro} times "
            f"{args.world_size} devices."
        )
    # The arguments are made again, because DeepSpeed's batch size is worked out when they are made.
    return make(per_device_train_batch_size=micro, gradient_accumulation_steps=passes)


class PruningTrainer(Trainer):
    """Trains the parameters with ``requires_grad`` of a patched model with learned thresholds.

    Args:
        settings: learning rates and the weight of distillation are taken from them.
        kwargs: arguments of transformers' own Trainer.

    Attributes:
        settings: as they were given.
        meter: holds the averages since the last line of progress.
        partial: whether some parameters of the decoder do not learn, so that checkpoints hold only
            what does.
        skipped: numbers of the samples that were left out.
        restored: whether the weights are those of a checkpoint, and no step was trained since.
    """

    def __init__(self, settings: Settings, **kwargs: Any) -> None:
        self.optimizer: Any = None
        super().__init__(**kwargs)
        self.settings, self.meter = settings, Meter()
        self.skipped: set[int] = set()
        self.restored = False
        self.partial = any(not p.requires_grad for p in self.model.get_decoder().parameters())
        self.remove_callback(PrinterCallback)

    def create_optimizer(self, model: Any = None) -> Any:
        """Make AdamW for the groups of :func:`parameter_groups`; the heads have no weight decay."""
        if self.optimizer is None:
            settings = self.settings
            groups = parameter_groups(
                self.model, settings.lr, settings.atp_lr, settings.atp_bias_lr
            )
            for group in groups:
                group["weight_decay"] = settings.weight_decay if group["name"] == "model" else 0.0
            make, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = make(groups, **options)
        return self.optimizer

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the model's own loss (eq. 14), and the divergence from the plain model if settings
        ask for distillation.

        Raises:
            ATPError: where the loss, or what is learned, is not finite any more.
        """
        inputs = dict(inputs)
        skipped = inputs.pop(SKIPPED, None)
        self.skipped.update([] if skipped is None else skipped.tolist())
        try:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        except ATPError as error:
            if self._is_finite():
                raise
            raise self._diverged("what is learned") from error
        images = any(name.startswith("pixel_values") for name in inputs)
        trace = last_trace(self.model) if images else None
        answer = inputs["labels"][:, 1:] != IGNORED
        if trace is not None:  # no output is learned where a visual token was pruned
            answer = answer & trace.layers[max(trace.layers)].kept[:, :-1].to(answer.device)
        log_prob = outputs.logits[:, :-1][answer].float().log_softmax(-1)
        target = inputs["labels"][:, 1:][answer]
        divergence = None
        if self.settings.distill:
            divergence = self._divergence(model, inputs, answer, log_prob)
            count = target.numel() if num_items_in_batch is None else num_items_in_batch
            ranks = 1
            if num_items_in_batch is not None and self.args.average_tokens_across_devices:
                ranks = self.accelerator.num_processes
            loss = loss + self.settings.distill * ranks * (divergence / count).to(loss)
        if not bool(torch.isfinite(loss.detach())):
            raise self._diverged("the loss")
        self.meter.add(log_prob.detach(), target, answer, trace, divergence)
        return (loss, outputs) if return_outputs else loss

    def _is_finite(self) -> bool:
        """Return whether everything that learns is still finite."""
        learned = (p for p in self.model.parameters() if p.requires_grad)
        return all(bool(p.isfinite().all()) for p in learned)

    def _diverged(self, what: str) -> ATPError:
        return ATPError(
            f"{what} is NaN or infinite in step {self.state.global_step + 1}; train anew with a "
            "lower lr or atp_lr, in another out."
        )

    def _divergence(
        self, model: Any, inputs: dict[str, Any], answer: Tensor, log_prob: Tensor
    ) -> Tensor:
        """Return KL(plain || pruned), summed over the answers' tokens (N, vocabulary)."""
        given = {name: value for name, value in inputs.items() if name != "labels"}
        with torch.no_grad(), disabled(self.model):
            plain = model(**given).logits[:, :-1][answer].float().log_softmax(-1)
        return kl_div(log_prob, plain, reduction="sum", log_target=True)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log what transformers logs, and what the meter took in since the last line."""
        if "loss" in logs:
            logs = {**logs, **self.meter.take(), "skipped": len(self.skipped)}
        super().log(logs, start_time)

    # -- checkpoints ------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.partial:
            super()._save(output_dir, state_dict)
            return
        if not self.args.should_save:
            return
        state = self.model.state_dict() if state_dict is None else state_dict
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        learned = {name: state[name].detach().cpu().contiguous() for name in self._learned()}
        save_file(learned, folder / LEARNED_FILE, metadata={"format": "pt"})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if not self.partial:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        file = Path(resume_from_checkpoint) / LEARNED_FILE
        learned = load_file(file) if file.is_file() else {}
        if set(learned) != set(self._learned()):
            raise WeightsError(f"{file} does not hold what this training learns; check out.")
        (self.model if model is None else model).load_state_dict(learned, strict=False)

    def restore(self, checkpoint: str) -> None:
        """Take the weights and the state of a checkpoint without training on.

        Raises:
            WeightsError: where the checkpoint holds other weights than this training learns.
        """
        self._load_from_checkpoint(checkpoint)
        self.restored = True
        self.state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))

    def whole_state(self) -> dict[str, Tensor]:
        """Return all weights and buffers, put together where each process holds a part."""
        if self.restored:  # no engine has taken the model apart
            return dict(self.model.state_dict())
        state: dict[str, Tensor] = self.accelerator.get_state_dict(self.model_wrapped)
        return state

    def _learned(self) -> list[str]:
        """Return names in the model's ``state_dict`` of the heads and of everything else that
        learns.
        """
        learned = {name for name, p in self.model.named_parameters() if p.requires_grad}
        keys = self.model.state_dict()
        return [key for key in keys if key in learned or key.startswith(MODULE_NAME + ".")]

    def save_now(self) -> Path | None:
        """Save a checkpoint of the last whole step after the loop was left.

        Returns:
            its folder; None before the first step, and where several processes train, as they would
            wait for each other.
        """
        step = self.state.global_step
        if not step or self.optimizer is None or self.args.world_size > 1:
            return None
        folder = Path(self.args.output_dir) / f"checkpoint-{step}"
        if not (folder / TRAINER_STATE_NAME).is_file():  # the Trainer writes this file last
            self._save_checkpoint(self.model, trial=None)
        return folder
