"""Where DeepSpeed keeps what it trains: the only place that reads its internals.

ZeRO flattens the parameters of a group into one tensor and gives each rank a stretch of it, with
the master weights in full precision and the optimizer's state; the inner optimizer steps these
flat tensors. Stage 3 cuts every parameter by itself, stages 1 and 2 the flat tensor. (Rajbhandari
et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", SC 2020.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import INITIAL_MICRO_STEP_ID, DeepSpeedZeroOptimizer
from torch import nn
from torch.optim import Optimizer

from asymcheck.errors import UnsupportedStateError
from asymcheck_torch.parts import Part, stretch

_KNOWN_VERSIONS = ("0.19",)


@dataclass(frozen=True, slots=True)
class Place:
    """Where this rank holds elements [start, start + count) of a parameter, flattened.

    Attributes:
        flat: the number of the flat tensor.
        offset: where they begin in it.
    """

    flat: int
    offset: int
    start: int
    count: int


@dataclass(frozen=True, slots=True)
class Masters:
    """The master weights of an engine's optimizer.

    Attributes:
        optimizer: the inner one, which steps `flats`.
        flats: the tensors that it steps on this rank, in the order in which it does.
        parameters: for each of them, the parameters that it holds stretches of.
        groups: for each of them, the number of its parameter group.
        places: by the `id` of the parameter; of a parameter that does not reach this rank there
            is none.
        is_shared: every rank holds them whole.
        refresh: makes the model's weights what the masters say, on all ranks together.
    """

    optimizer: Optimizer
    flats: list[torch.Tensor]
    parameters: list[list[nn.Parameter]]
    groups: list[int]
    places: dict[int, Place]
    is_shared: bool
    refresh: Callable[[], None]


def check_engine(engine: Any) -> None:
    """Refuse what this module does not know, by name.

    Raises:
        UnsupportedStateError: another version of DeepSpeed, or a feature that splits or moves the
            state in a way of its own.
    """
    if not deepspeed.__version__.startswith(tuple(f"{known}." for known in _KNOWN_VERSIONS)):
        raise UnsupportedStateError(
            "the layout of this version of DeepSpeed is not known",
            expected=" or ".join(f"{known}.x" for known in _KNOWN_VERSIONS),
            found=deepspeed.__version__,
        )
    for name, used in _unknown_features(engine):
        if used:
            raise UnsupportedStateError(
                f"DeepSpeed's {name} cannot be checkpointed",
                hint="Use ZeRO data parallelism with state in device or host memory",
            )


def _unknown_features(engine: Any) -> Iterator[tuple[str, bool]]:
    zero = engine.optimizer
    yield "pipeline engine", isinstance(engine, PipelineEngine)
    yield "mixture of experts", bool(engine.has_moe_layers)
    yield "model parallelism", engine.mp_world_size > 1
    yield "offloading to NVMe", _any(zero, "swap_optimizer", "params_in_nvme_and_cpu")
    yield "offloading of a part of the state", getattr(zero, "partial_offload", 1.0) != 1.0
    yield "ZenFlow", _any(zero, "zenflow")
    yield "curriculum learning", engine.curriculum_learning_enabled()
    yield "random-LTD", engine.random_ltd_enabled()
    yield "Muon", "muon" in type(engine.basic_optimizer).__name__.lower()
    yield "quantized weights", any(map(_is_quantized, engine.module.parameters()))
    yield "secondary partitions (hpZ)", getattr(zero, "zero_hpz_partition_size", 1) > 1
    for name, holder in (
        ("torch_autocast_gradscaler", zero),
        ("torch_autocast_z0_gradscaler", engine),
    ):
        yield "gradient scaler of torch's autocast", _any(holder, name)


def _any(zero: Any, *names: str) -> bool:
    return any(getattr(zero, name, None) for name in names)


def _is_quantized(parameter: Any) -> bool:
    return hasattr(getattr(parameter, "ds_tensor", None), "ds_quant_scale")


def masters_of(zero: Any) -> Masters | None:
    """The master weights of an engine's optimizer; None if that is torch's own.

    Raises:
        UnsupportedStateError: DeepSpeed keeps them in another way.
    """
    if isinstance(zero, Optimizer):
        return None
    if type(zero) is DeepSpeedZeroOptimizer_Stage3:  # others keep state elsewhere
        return _stage_3(zero)
    if type(zero) is DeepSpeedZeroOptimizer:
        flats, models = zero.single_partition_of_fp32_groups, zero.bit16_groups_flat
        return _flattened(zero, flats, zero.bit16_groups, models)
    if isinstance(zero, BF16_Optimizer):
        flats, models = zero.fp32_groups_flat_partition, zero.bf16_groups_flat
        return _flattened(zero, flats, zero.bf16_groups, models)
    if isinstance(zero, FP16_UnfusedOptimizer):
        return _unfused(zero)
    raise UnsupportedStateError(
        f"DeepSpeed's {type(zero).__name__} cannot be checkpointed", hint="Use ZeRO stage 1, 2 or 3"
    )


def _stage_3(zero: Any) -> Masters:
    places: dict[int, Place] = {}
    for parameters in zero.fp16_groups:
        for parameter in parameters:
            flat, offset, share = zero.grad_position[zero.get_param_id(parameter)]
            start, count = _own_stretch(parameter, share)
            places[id(parameter)] = Place(flat, offset, start, count)

    def refresh() -> None:
        zero.checkpoint_event_prologue()  # else parameters that are gathered now keep old values
        for number in range(len(zero.fp32_partitioned_groups_flat)):
            zero._reassign_or_swap_out_partitioned_parameters(number)
        zero.checkpoint_event_epilogue()

    groups = [zero.sub_group_to_group_id[number] for number in range(len(zero.fp16_groups))]
    flats = list(zero.fp32_partitioned_groups_flat)
    parameters = [list(group) for group in zero.fp16_groups]
    return Masters(zero.optimizer, flats, parameters, groups, places, False, refresh)


def _own_stretch(parameter: Any, share: int) -> tuple[int, int]:
    """(start, count) of this rank: equal shares, of which the last ones end in padding."""
    rank = dist.get_rank(group=parameter.ds_process_group)
    numel = int(parameter.ds_numel)
    start = min(rank * share, numel)
    return start, min(share, numel - start)


def _flattened(
    zero: Any, flats: list[torch.Tensor], groups: list[list[Any]], models: list[torch.Tensor]
) -> Masters:
    """The masters `flats` of this rank's parts of `models`, in which all parameters of a group lie.

    DeepSpeed's own map (`_hp_mapping`) is wrong where `round_robin_gradients` reorders them.
    """
    places: dict[int, Place] = {}
    for number, parameters in enumerate(groups):
        begin = dist.get_rank(group=zero.real_dp_process_group[number]) * flats[number].numel()
        for parameter in filter(torch.numel, parameters):
            first = _offset_in(models[number], parameter)
            start = max(begin - first, 0)
            offset = first + start - begin
            count = min(parameter.numel() - start, flats[number].numel() - offset)
            if count > 0:
                places[id(parameter)] = Place(number, offset, start, count)

    def refresh() -> None:
        if all(zero.optimizer.state.get(flat) for flat in flats):
            zero._hp_optimizer_states_linked = False  # so far with tensors that may be gone
            zero._lazy_init_hp_params_optimizer_state()  # else done after the first step
        zero.update_lp_params()

    numbers = list(range(len(flats)))
    parameters = [list(group) for group in groups]
    return Masters(zero.optimizer, list(flats), parameters, numbers, places, False, refresh)


def _offset_in(flat: torch.Tensor, parameter: nn.Parameter) -> int:
    """Where a parameter that is a view of a flat tensor begins in it."""
    offset = (parameter.data_ptr() - flat.data_ptr()) // flat.element_size()
    if not 0 <= offset <= flat.numel() - parameter.numel():
        raise UnsupportedStateError("a parameter does not lie in DeepSpeed's flat tensor")
    return offset


def _unfused(zero: Any) -> Masters:
    flats: list[torch.Tensor] = []
    parameters: list[list[nn.Parameter]] = []
    groups: list[int] = []
    places: dict[int, Place] = {}
    for number, (models, masters) in enumerate(
        zip(zero.fp16_groups, zero.fp32_groups, strict=True)
    ):
        for model, master in zip(models, masters, strict=True):
            places[id(model)] = Place(len(flats), 0, 0, master.numel())
            flats.append(master)
            parameters.append([model])
            groups.append(number)

    def refresh() -> None:
        for (model,), master in zip(parameters, flats, strict=True):
            model.data.copy_(master.data)

    return Masters(zero.optimizer, flats, parameters, groups, places, True, refresh)


def drop_gradients(engine: Any) -> None:
    """Forget what backward passes have left since the last update, in any stage.

    As DeepSpeed itself does after an update that is skipped.
    """
    zero = engine.optimizer
    engine.zero_grad()
    engine._unmanaged_backward_count = 0
    zero.zero_grad(set_to_none=True)
    if isinstance(zero, DeepSpeedZeroOptimizer_Stage3):
        _drop_gradients_of_stage_3(zero)
    elif isinstance(zero, DeepSpeedZeroOptimizer):
        _drop_gradients_of_partitions(zero)


def _drop_gradients_of_stage_3(zero: Any) -> None:
    zero.averaged_gradients = dict.fromkeys(zero.averaged_gradients)
    zero._offload_boundary_param_ids = set()
    zero.reset_cpu_buffers()
    if zero.grad_partitions_flat_buffer is not None:
        zero.grad_partitions_flat_buffer.zero_()  # else those of parameters without new ones count
    _zero_gradients(zero.fp32_partitioned_groups_flat)


def _drop_gradients_of_partitions(zero: Any) -> None:
    zero.micro_step_id = INITIAL_MICRO_STEP_ID
    zero._release_preflattened_grad_buffers()
    for sums in (zero.averaged_gradients, zero.all_grad_tensors):
        sums.update(dict.fromkeys(sums))
    if zero.cpu_offload:
        zero._offload_accumulated_param_ids = set()
        zero.reset_cpu_buffers()
    _zero_gradients(zero.single_partition_of_fp32_groups)


def _zero_gradients(masters: list[torch.Tensor]) -> None:
    """Where the optimizer is offloaded, they keep the memory of their gradients."""
    for master in masters:
        if master.grad is not None:
            master.grad.zero_()


def frozen_part(parameter: Any) -> torch.Tensor | Part:
    """A parameter that is not trained: stage 3 cuts it, too."""
    if not hasattr(parameter, "ds_tensor"):
        return parameter
    share: torch.Tensor = parameter.ds_tensor
    start, count = _own_stretch(parameter, share.numel())
    return stretch(share[:count], tuple(parameter.ds_shape), start, id(parameter))


def loss_scaler_of(zero: Any) -> Any:
    """The object that holds the loss scale, or None."""
    return getattr(zero, "loss_scaler", None) or getattr(zero, "loss_scale_config", None)
