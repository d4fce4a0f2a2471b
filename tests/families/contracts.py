"""What transformers promises of its models, asked of patched ones whose pictures have real grids.

Two classes take these contracts. Where everything is kept, the plain model says what is right.
Where tokens are pruned, the patched model's own ordinary call does, which other tests compare with
an oracle.

Of transformers' contracts, these are kept by other tests of ours:

=================================================  ===============================================
contract                                           test
=================================================  ===============================================
forward is that of the model                       test_every_family.test_keeping_all_is_plain_...
eager is sdpa                                      test_every_family.test_eager_attention_...
left padding, a batch is its samples               test_every_family.test_a_batch_is_its_samples_...
beams of a batch are its samples' beams            test_every_family.test_beams_of_a_batch_...
``use_cache=False`` while generating               test_every_family.test_the_cache_changes_...
greedy, sampling, beams, several sequences         tests/cells.py, of every family
prompt lookup, an assistant, streaming, guidance   tests/cells.py, of every family
static cache, quantized cache, custom generation   tests/cells.py, of every family
going on from ``past_key_values``                  tests/cells.py, of every family
generating from ``inputs_embeds``                  tests/cells.py, of every family
offloaded cache                                    seam/test_generation.test_an_offloaded_cache_...
an answer that ends early                          seam/test_generation.test_a_sample_may_end_...
compiled decoding                                  seam/test_compile
attention and hidden states are the right ones     seam/test_outputs, of two families
the loss, and labels that line up                  seam/test_outputs, of two families
half precision, deep copies                        seam/test_copies, of two families
weights on the disk                                core/test_devices, of two families
reentrant checkpointing is refused                 core/test_learning
data parallel replicas are refused                 seam/test_unusual_calls
=================================================  ===============================================

The rest is below, for every family. Contracts of training from nothing (initial weights, missing
keys, tensor-parallel plans, export) do not touch what a patch changes.
"""

from __future__ import annotations

import inspect
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn

import atp_patch
from tests.families.kinds import MIXED, SINGLE, Kind, make
from tests.helpers.compare import assert_close
from tests.helpers.inputs import Inputs, real_mask
from tests.helpers.run import forward, generate, kept_of

PUBLIC = ("forward", "generate", "prepare_inputs_for_generation", "get_image_features")
MORE_WORDS = 8


def parts(value: Any) -> list[Tensor]:
    """Every tensor of a nested output, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [one for part in value for one in parts(part)]
    if isinstance(value, dict):
        return parts(list(value.values()))
    return []


def same(ours: Any, theirs: Any) -> bool:
    """Whether two nested outputs have equal tensors."""
    return all(torch.equal(*pair) for pair in zip(parts(ours), parts(theirs), strict=True))


def shapes(value: Any) -> list[torch.Size]:
    """The shapes of every tensor of a nested output, in order."""
    return [one.shape for one in parts(value)]


def gradients(model: Any) -> dict[str, Tensor]:
    """The gradients of the parameters that have one."""
    named = model.named_parameters()
    return {name: value.grad for name, value in named if value.grad is not None}


def loss_of(model: Any, inputs: Inputs) -> Tensor:
    """The mean cross-entropy of the last two words of each sample, from the public logits."""
    logits = model(**inputs, use_cache=False).logits
    answers = inputs["input_ids"][:, -2:]
    return nn.functional.cross_entropy(logits[:, -3:-1].flatten(0, 1), answers.flatten())


def loaded_again(kind: Kind, folder: Path) -> Any:
    """The plain model of a folder that ``save_pretrained`` has written."""
    try:
        loaded = kind.model.from_pretrained(folder, attn_implementation=kind.attention)
    except ImportError as error:  # Gemma 3n and FastVLM load their towers with timm
        pytest.skip(f"the plain model cannot be loaded here: {error}")
    return loaded.eval()


# What a call asks for to get what the layers make.
INNER = {"output_hidden_states": True, "output_attentions": True}


class Contracts:
    """Contracts of a model; a class that takes them says what share of the tokens is kept.

    Attributes:
        keep: the share.
    """

    keep: float

    def patched(self, kind: Kind, attention: str | None = None) -> Any:
        """A fresh patched model."""
        model = kind.build()
        if attention is not None:
            model.set_attn_implementation(attention)
        return self.patch(kind, model)

    def patch(self, kind: Kind, model: Any) -> Any:
        """Patch a model; the method chooses by its scores."""
        return atp_patch.patch_model(model, method="fastv", keep=self.keep, layers=kind.layers)

    def eager_pair(self, kind: Kind) -> tuple[Any, Any]:
        """The plain and the patched model with eager attention, whose maps can be asked for."""
        plain = kind.build()
        plain.set_attn_implementation("eager")
        return plain, self.patched(kind, "eager")

    def seen(self, model: Any, inputs: Inputs) -> Tensor:
        """(B, L) bool: the places whose outputs are promised, after a pass."""
        kept = kept_of(model)
        return kept[max(kept)] & real_mask(inputs)

    def test_signatures_are_those_of_the_class(self, kind: Kind) -> None:
        plain, model = kind.build(), self.patched(kind)
        for name in PUBLIC:
            if hasattr(plain, name):
                ours, theirs = (inspect.signature(getattr(one, name)) for one in (model, plain))
                assert ours == theirs, name

    def test_all_outputs_have_public_shapes(self, kind: Kind) -> None:
        """Hidden states, attention maps, tuples, and the logits that were asked for."""
        inputs = make(kind, MIXED).inputs
        plain, model = self.eager_pair(kind)
        theirs, ours = (forward(one, inputs, **INNER) for one in (plain, model))
        for name in ("hidden_states", "attentions"):
            assert shapes(ours[name]) == shapes(theirs[name]), name
        lengths = [
            None if cache is None else cache.get_seq_length()  # not every model makes one
            for cache in (ours.past_key_values, theirs.past_key_values)
        ]
        assert lengths[0] == lengths[1]
        where = self.seen(model, inputs)
        assert where[:, -2:].all()
        if self.has_tuples(plain, inputs):
            bare = forward(model, inputs, return_dict=False)
            assert type(bare) is tuple
            assert torch.equal(bare[0], ours.logits)
        if "logits_to_keep" in inspect.signature(plain.forward).parameters:
            for count in (1, 2):
                last = forward(model, inputs, logits_to_keep=count).logits
                assert_close(last, ours.logits[:, -count:])

    @staticmethod
    def has_tuples(plain: Any, inputs: Inputs) -> bool:
        """Whether the plain model gives a tuple where it is asked for one."""
        try:
            return type(forward(plain, inputs, return_dict=False)) is tuple
        except Exception:
            return False

    def test_all_outputs_of_generate_have_public_shapes(self, kind: Kind) -> None:
        inputs = make(kind, MIXED).inputs
        plain, model = self.eager_pair(kind)
        wanted = {
            "return_dict_in_generate": True,
            **dict.fromkeys(("output_scores", "output_logits"), True),
            **INNER,
        }
        theirs, ours = (generate(one, inputs, 2, **wanted) for one in (plain, model))
        for name in ("scores", "logits", "hidden_states"):
            assert shapes(ours[name]) == shapes(theirs[name]), name
        # The plain model's sliding layers forget what is behind their window; pruned ones mask it.
        for step in range(2):
            whole = inputs["input_ids"].shape[1] + step
            pairs = zip(ours.attentions[step], theirs.attentions[step], strict=True)
            for found, plain_map in pairs:
                assert found.shape[:-1] == plain_map.shape[:-1]
                assert found.shape[-1] in (plain_map.shape[-1], whole)
        assert torch.equal(ours.sequences, generate(model, inputs, 2))

    def test_beams_that_are_drawn_are_the_same_without_a_cache(self, kind: Kind) -> None:
        inputs = make(kind, SINGLE).inputs
        wanted = {"num_beams": 2, "do_sample": True, "num_return_sequences": 2}
        model, plain = self.patched(kind), kind.build()
        try:
            theirs = [generate(plain, inputs, 2, use_cache=use, **wanted) for use in (True, False)]
        except Exception as error:
            pytest.skip(f"the plain model does not take it: {error}")
        ours = [generate(model, inputs, 2, use_cache=use, **wanted) for use in (True, False)]
        if torch.equal(*theirs):
            assert torch.equal(*ours)
        assert ours[0].shape == theirs[0].shape

    def test_saved_loaded_and_patched_again_it_is_the_same(
        self, kind: Kind, tmp_path: Path
    ) -> None:
        """``save_pretrained`` writes the plain model; ``torch.save`` the patched one."""
        inputs = make(kind, MIXED).inputs
        model = self.patched(kind)
        expected = forward(model, inputs).logits
        stream = io.BytesIO()
        torch.save(self.patched(kind), stream)  # some hosts cannot be pickled once they have run
        stream.seek(0)
        again = torch.load(stream, weights_only=False)
        assert torch.equal(forward(again, inputs).logits, expected)
        assert list(model.state_dict()) == list(kind.build().state_dict())
        model.save_pretrained(tmp_path)
        loaded = loaded_again(kind, tmp_path)
        plain = forward(kind.build(), inputs).logits
        assert torch.equal(forward(loaded, inputs).logits, plain)
        assert torch.equal(forward(self.patch(kind, loaded), inputs).logits, expected)

    def test_tied_weights_stay_tied(self, kind: Kind, tmp_path: Path) -> None:
        plain = kind.build()
        for part in (plain.config, plain.config.get_text_config()):
            part.tie_word_embeddings = True
        plain.tie_weights()
        head, words = plain.get_output_embeddings(), plain.get_input_embeddings()
        if head is None or head.weight is not words.weight:
            pytest.skip("this model has a head of its own")
        inputs = make(kind, SINGLE).inputs
        plain.save_pretrained(tmp_path / "plain")
        again = loaded_again(kind, tmp_path / "plain")
        if not torch.equal(forward(again, inputs).logits, forward(plain, inputs).logits):
            pytest.skip("the plain model does not come back from its own files")
        model = self.patch(kind, plain)
        model.tie_weights()
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
        expected = forward(model, inputs).logits
        model.save_pretrained(tmp_path)
        loaded = loaded_again(kind, tmp_path)
        assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
        assert torch.equal(forward(self.patch(kind, loaded), inputs).logits, expected)

    def test_embeddings_may_be_resized_and_replaced(self, kind: Kind) -> None:
        inputs = make(kind, MIXED).inputs
        model, plain = self.patched(kind), kind.build()
        expected = forward(model, inputs).logits
        where = self.seen(model, inputs)
        count = plain.get_input_embeddings().weight.shape[0]
        try:
            plain.resize_token_embeddings(count + MORE_WORDS, mean_resizing=False)
            forward(plain, inputs)
        except Exception as error:
            pytest.skip(f"the plain model does not take it: {error}")
        model.resize_token_embeddings(count + MORE_WORDS, mean_resizing=False)
        grown = forward(model, inputs).logits
        assert_close(grown[..., : expected.shape[-1]], expected, where)
        assert torch.equal(self.seen(model, inputs), where)
        words = model.get_input_embeddings()
        other = nn.Embedding(*words.weight.shape)
        with torch.no_grad():
            other.weight.copy_(words.weight)
        if type(words) is nn.Embedding:
            model.set_input_embeddings(other)
            assert torch.equal(forward(model, inputs).logits, grown)
            assert torch.equal(self.seen(model, inputs), where)

    def test_a_step_of_training_with_and_without_checkpoints(self, kind: Kind) -> None:
        """Both have the same gradients, of the same parameters as the plain model's."""
        inputs = make(kind, SINGLE).inputs
        plain, model, checked = kind.build(), self.patched(kind), self.patched(kind)
        for one in (plain, model, checked):
            one.train()
            for module in one.modules():
                if isinstance(module, nn.Dropout):
                    module.p = 0.0
        if checked.supports_gradient_checkpointing:
            checked.gradient_checkpointing_enable({"use_reentrant": False})
        found = []
        for one in (plain, model, checked):
            loss = loss_of(one, inputs)
            loss.backward()
            found.append(gradients(one))
        theirs, ours, replayed = found
        assert set(ours) == set(theirs) == set(replayed)
        assert all(bool(value.isfinite().all()) for value in ours.values())
        for name, value in ours.items():
            torch.testing.assert_close(replayed[name], value, rtol=1e-4, atol=1e-5)
        before = float(loss_of(model, inputs).detach())
        torch.optim.SGD(model.parameters(), lr=1e-4).step()
        assert float(loss_of(model, inputs).detach()) < before

    def test_hidden_states_keep_their_gradients(self, kind: Kind) -> None:
        inputs = make(kind, SINGLE).inputs
        model = self.patched(kind)
        out = model(**inputs, use_cache=False, output_hidden_states=True)
        first = out.hidden_states[0]
        if not first.requires_grad:
            pytest.skip("the plain model's first hidden states have no gradient")
        first.retain_grad()
        out.logits[:, -1].sum().backward()
        assert first.grad is not None
        assert first.grad.abs().max() > 0

    def test_bfloat16(self, kind: Kind) -> None:
        inputs = make(kind, MIXED).inputs
        try:
            forward(kind.build().bfloat16(), self.rounded(inputs))
        except Exception as error:
            pytest.skip(f"the plain model does not take it: {error}")
        model = self.patch(kind, kind.build().bfloat16())
        logits = forward(model, self.rounded(inputs)).logits
        assert logits.dtype == torch.bfloat16
        assert logits[self.seen(model, inputs)].isfinite().all()

    @staticmethod
    def rounded(inputs: Inputs) -> Inputs:
        """The inputs with pixels in bfloat16."""
        return {
            name: value.bfloat16()
            if isinstance(value, Tensor) and value.is_floating_point()
            else value
            for name, value in inputs.items()
        }

    def test_weights_may_be_moved_by_accelerate(self, kind: Kind) -> None:
        inputs = make(kind, MIXED).inputs
        plain = kind.build()
        try:
            forward(cpu_offload(plain, execution_device=torch.device("cpu")) or plain, inputs)
        except Exception as error:
            pytest.skip(f"the plain model does not take it: {error}")
        model = self.patched(kind)
        expected = forward(model, inputs).logits
        cpu_offload(model, execution_device=torch.device("cpu"))
        assert torch.equal(forward(model, inputs).logits, expected)

    def test_features_asked_for_by_themselves_are_the_plain_ones(self, kind: Kind) -> None:
        inputs = make(kind, SINGLE).inputs
        plain, model = kind.build(), self.patched(kind)
        ask = getattr(plain, "get_image_features", None)
        if ask is None:
            pytest.skip("this model gives no features by themselves")
        known = inspect.signature(ask).parameters
        given = {name: value for name, value in inputs.items() if name in known}
        with torch.no_grad():
            try:
                theirs = ask(**given)
            except Exception as error:
                pytest.skip(f"the plain model does not take it: {error}")
            ours = model.get_image_features(**given)
        assert same(ours, theirs)

    def test_pictures_that_do_not_fit_the_ids_are_an_error(self, kind: Kind) -> None:
        """As they are in the plain model, or one of the package's own."""
        batch = make(kind, SINGLE)
        place = next(at for at, found in enumerate(batch.places[0]) if found is not None)
        inputs = {
            name: torch.cat([value[:, :place], value[:, place + 1 :]], 1)
            if isinstance(value, Tensor) and value.shape == batch.inputs["input_ids"].shape
            else value
            for name, value in batch.inputs.items()
        }
        try:
            forward(kind.build(), inputs)
        except Exception as error:
            expected: tuple[type[Exception], ...] = (atp_patch.ATPError, type(error))
        else:
            expected = (atp_patch.ATPError,)
        with pytest.raises(expected):
            forward(self.patched(kind), inputs)

    def test_a_mask_of_four_dimensions_is_that_of_two(self, kind: Kind) -> None:
        """Where it says the same; or it is refused, as some hosts do too."""
        inputs = make(kind, MIXED).inputs
        real = real_mask(inputs)
        length = real.shape[1]
        seen = torch.ones(length, length, dtype=torch.bool).tril() & real[:, None, None, :]
        seen = seen | torch.eye(length, dtype=torch.bool)
        mask = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        given = {**inputs, "attention_mask": mask}
        plain, model = kind.build(), self.patched(kind)
        try:
            wanted = forward(plain, given).logits
            assert_close(wanted, forward(plain, inputs).logits, real)
        except (Exception, AssertionError) as error:
            pytest.skip(f"the plain model does not take it: {error}")
        try:
            found = forward(model, given).logits
        except atp_patch.ATPError:
            return
        expected = forward(model, inputs).logits
        assert_close(found, expected, self.seen(model, inputs))
