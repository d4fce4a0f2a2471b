"""Loading an adapter, after checks that it is complete, undamaged, and made for this model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from atp_patch.contract.arguments import shown
from atp_patch.contract.errors import ConfigError, WeightsError, first_line
from atp_patch.contract.method_learning import check_module
from atp_patch.methods import MethodSet, ModuleSpec, make_method, make_methods
from atp_patch.patching.adapter_files import CONFIG_FILE, WEIGHTS_FILE, AdapterSource, read_text
from atp_patch.patching.config import BaseModel, PruningConfig
from atp_patch.patching.made_with import MadeWith
from atp_patch.patching.voco import check_alone

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LARGEST = 1e6  # the largest learned weight, so that sums of heads' inputs stay within float32


@dataclass(frozen=True)
class Loaded:
    """What an adapter's files hold, checked.

    Attributes:
        config: the configuration.
        methods: its methods.
        tensors: the learned weights by name, in the dtypes of the method's module.
        made_with: what the adapter was made with.
    """

    config: PruningConfig
    methods: MethodSet
    tensors: dict[str, Tensor]
    made_with: MadeWith


def load_adapter(source: AdapterSource, base: BaseModel | None = None) -> Loaded:
    """Read an adapter from a folder or the Hub and check that it is complete and fits ``base``.

    No memory of a size that the configuration names is allocated before the weights file is found
    to hold tensors of that size.

    Args:
        source: where the files lie.
        base: the model that it must have been made for; None: any.

    Raises:
        HubError: if the Hub refuses the files or cannot be reached.
        WeightsError: if a file is missing, damaged, of another program, or made for another model.
    """
    where = f"{source}/{CONFIG_FILE}"
    text = read_text(source.file(CONFIG_FILE), where)
    config, made_with = PruningConfig.from_json(text, where), MadeWith.from_json(text, where)
    if base is not None and config.base != base:
        raise WeightsError(
            f"{source} was made for {_describe(config.base)}, but this model is "
            f"{_describe(base)}; load the model it was made for, or patch without weights."
        )
    try:
        methods = _methods_of(config)
        expected = _expected(config, methods)
    except ConfigError as error:
        raise WeightsError(f"{where}: {error}") from error
    if expected:
        tensors = _read_tensors(source, expected)
        return Loaded(config, methods, tensors, made_with)
    if (source.folder / WEIGHTS_FILE).exists():
        raise WeightsError(
            f"{source}/{WEIGHTS_FILE} holds weights, but nothing was learned according to "
            f"{CONFIG_FILE}. "
            "Save the adapter anew with atp_patch.save_pretrained."
        )
    return Loaded(config, methods, {}, made_with)


def check_values(tensors: Mapping[str, Tensor], where: str) -> None:
    """Check that learned tensors hold usable numbers.

    Args:
        tensors: the tensors by name.
        where: where they come from, for the error message.

    Raises:
        WeightsError: if a number is NaN, infinite or absurdly large.
    """
    for name, tensor in tensors.items():
        if tensor.is_meta:
            continue
        wrong = None
        if not tensor.isfinite().all():
            wrong = "NaN or infinite values"
        elif tensor.is_floating_point() and (tensor.abs() > _LARGEST).any():
            wrong = f"values beyond {_LARGEST:g}"
        if wrong is not None:
            raise WeightsError(
                f"{where}: {name} holds {wrong}. The training that made it has diverged or the "
                "file is damaged; take an earlier adapter."
            )


def _methods_of(
    config: PruningConfig,
) -> MethodSet:
    """Make the methods that a configuration names.

    Raises:
        ConfigError: if a method prunes at another place than it is named for, or its options are
            wrong.
    """
    stages = [] if config.before is None else [(config.before.method, config.before.options)]
    stages += [] if config.method is None else [(config.method, config.options)]
    methods = make_methods([make_method(*stage) for stage in stages], {})
    if (methods.before is None) != (config.before is None):
        raise ConfigError(
            f"{config.name} is in the wrong place: before= is for a method that prunes before the "
            "decoder, method= for one that prunes inside it."
        )
    if methods.voco is not None:
        check_alone(config)
    return methods


def _expected(config: PruningConfig, methods: MethodSet) -> dict[str, Tensor]:
    """Return the tensors that an adapter of this configuration must hold, by name, on the meta
    device.
    """
    module: nn.Module | None = None
    with torch.device("meta"):
        if methods.layer is not None:
            spec = ModuleSpec(config.layers, config.base.hidden_size, config.shares(None))
            module = check_module(methods.layer.build(spec), methods.layer.name)
        elif methods.voco is not None:
            module = methods.voco.build(config.base.hidden_size)
    return {} if module is None else dict(module.state_dict())


def _read_tensors(source: AdapterSource, expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Read the learned weights, after checking that the file's header lists exactly these."""
    where, file = f"{source}/{WEIGHTS_FILE}", source.file(WEIGHTS_FILE)
    try:
        with safe_open(file, framework="pt") as opened:
            names = list(opened.keys())
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in names}
            _check_shapes(where, shapes, {name: tuple(one.shape) for name, one in expected.items()})
            read = {name: opened.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{where} is not a safetensors file ({first_line(error)}).") from error
    for name, tensor in read.items():
        wanted = expected[name].dtype
        if tensor.dtype not in (_FLOATS if wanted in _FLOATS else (wanted,)):
            raise WeightsError(
                f"{where}: {name} is of {tensor.dtype}, not of {wanted}. Save the adapter anew "
                "with atp_patch.save_pretrained."
            )
    tensors = {name: tensor.to(expected[name].dtype) for name, tensor in read.items()}
    check_values(tensors, where)
    return tensors


def _check_shapes(
    where: str, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise WeightsError if a file does not hold exactly the expected tensors."""
    missing = sorted(set(expected) - set(found))
    unknown = sorted(set(found) - set(expected))
    wrong = sorted(k for k in set(expected) & set(found) if found[k] != expected[k])
    if missing or unknown or wrong:
        raise WeightsError(
            f"{where} does not hold this adapter's tensors: {len(missing)} missing "
            f"{missing[:3]}, {len(unknown)} unknown {shown(unknown[:3])}, {len(wrong)} of wrong "
            f"shape {wrong[:3]}. Save the adapter anew with atp_patch.save_pretrained."
        )


def _describe(base: BaseModel) -> str:
    return f"a {base.family} model of {base.num_layers} layers, hidden size {base.hidden_size}"
