"""What a LoRA's metadata says of it, brought to what its matrices bear out: ranks are theirs, targets are the modules that have some.

peft would take more from it: patterns matched as regular expressions, modules to import, ways to change the base's weights. None of that
reaches peft from here.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from latentfm.words import shown

MOST_PATTERNS = 512  # the different ranks or alphas of one adapter
PLAIN = re.compile(r"\^?(?:[A-Za-z0-9_.-]|\\\.){1,200}\$?")  # of a pattern that is a name, or its ending
STARTS = ("gaussian", "orthogonal", "eva")  # besides peft's own; other ways to begin an adapter change the base's weights too
CHANGING = (  # settings with which an adapter computes something else than a LoRA does
    "layer_replication", "modules_to_save", "trainable_token_indices", "target_parameters", "alora_invocation_tokens", "arrow_config",
    "use_qalora", "use_bdlora", "kasa_config", "velora_config", "monteclora_config", "fan_in_fan_out",
)  # fmt: skip
READ = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_bias", "lora_dropout")
IDLE = (  # settings that no longer matter once an adapter is trained
    "task_type", "peft_type", "peft_version", "base_model_name_or_path", "revision", "auto_mapping", "inference_mode", "init_lora_weights",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "bias", "megatron_config", "megatron_core",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config", "ensure_weight_tying",
)  # fmt: skip
LYCORIS = ("LOHA", "LOKR")  # peft's types whose change is alpha / r times what their tensors make, whether r shows in them or not
LYCORIS_IDLE = (
    "rank_dropout", "module_dropout", "rank_dropout_scale", "use_effective_conv2d", "decompose_both", "decompose_factor", "init_weights",
)  # fmt: skip


def plain_config(said: Mapping[str, Any], ranks: Mapping[str, int], alphas: Mapping[str, float], dora: bool, bias: bool) -> dict[str, Any]:
    """LoraConfig's arguments for an adapter whose modules have these `ranks`, as `said` in its metadata, which may be empty.

    alphas: by module, from tensors beside the matrices; where nothing is said of alpha it is the rank. dora, bias: whether there are
    magnitudes, and biases. Raises ValueError for what contradicts the matrices, or would compute something else than a LoRA.
    """
    check_settings(said)
    rank, rank_pattern = said_or_found("r", "rank_pattern", said, ranks)
    for module, found in ranks.items():
        if (wanted := of_module(module, rank, rank_pattern)) != found:
            raise ValueError(f"its metadata says rank {shown(wanted, 40)} of {shown(module, 100)}, its matrices are of rank {found}")
    for key, there in (("use_dora", dora), ("lora_bias", bias)):
        if bool(said.get(key, there)) != there:
            raise ValueError(f"its metadata says {key} {json.dumps(said[key])}, and its tensors say otherwise")
    alpha, alpha_pattern = said_or_found("lora_alpha", "alpha_pattern", {} if alphas else said, dict(ranks) | alphas)
    return {
        "r": rank, "lora_alpha": alpha, "rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern, "target_modules": sorted(ranks),
        "use_dora": dora, "lora_bias": bias, "use_rslora": said.get("use_rslora") or False, "lora_dropout": said.get("lora_dropout") or 0.0,
    }  # fmt: skip


def said_or_found(key: str, pattern_key: str, said: Mapping[str, Any], found: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """A number and its exceptions by pattern: as they are said, else the most frequent one that was found, and the others by module."""
    if said.get(key) is not None:
        return said[key], dict(said.get(pattern_key) or {})
    most = Counter(found.values()).most_common(1)[0][0]
    others = {f"^{module}": number for module, number in found.items() if number != most}
    if len(others) > MOST_PATTERNS:
        raise ValueError(f"it has {len(others):,} modules of other ranks or alphas than the rest; at most {MOST_PATTERNS} are read")
    return most, others


def of_module(module: str, usual: float, pattern: Mapping[str, float]) -> float:
    """What peft would take for `module`: the first pattern that is its name or an ending of it, else the usual."""
    for key, number in pattern.items():
        name = key.removesuffix("$").replace("\\", "")
        if module == name.removeprefix("^") or (name[:1] != "^" and module.endswith(f".{name}")):
            return number
    return usual


def check_settings(said: Mapping[str, Any]) -> None:
    """Raises ValueError for settings of the wrong kind, out of bounds, or that would compute something else than a LoRA."""
    for key, value in said.items():
        known = key in READ or key in IDLE
        if key in CHANGING and value or (not known and key not in CHANGING and value):
            raise ValueError(f"its metadata sets {shown(key, 80)}, which is not read here")
    start = said.get("init_lora_weights")
    if not isinstance(start, (bool, type(None))) and start not in STARTS:
        raise ValueError(
            f"it began as {shown(json.dumps(start), 40)}, which changes the base's weights too; have peft convert it to a plain LoRA"
        )
    if said.get("bias") not in (None, "none"):
        raise ValueError(f"its metadata says bias {shown(said['bias'], 40)}: biases of the base are not read")
    for key in ("use_rslora", "use_dora", "lora_bias"):
        if not isinstance(said.get(key), (bool, type(None))):
            raise ValueError(f"its metadata says {key} {shown(json.dumps(said[key]), 40)}, neither true nor false")
    for key in ("r", "lora_alpha", "lora_dropout"):
        if said.get(key) is not None and not is_number(said[key], whole=key == "r"):
            raise ValueError(f"its metadata says {key} {shown(json.dumps(said[key]), 40)}, which is no number for it")
    for key in ("rank_pattern", "alpha_pattern"):
        pattern = said.get(key) or {}
        if not isinstance(pattern, dict) or len(pattern) > MOST_PATTERNS:
            raise ValueError(f"its metadata's {key} is no table of at most {MOST_PATTERNS} modules")
        for name, number in pattern.items():
            if not PLAIN.fullmatch(name) or not is_number(number, whole=key == "rank_pattern"):
                raise ValueError(f"its metadata's {key} says {shown(name, 80)}: {shown(json.dumps(number), 40)}, which is not read here")


def check_lycoris(said: Mapping[str, Any]) -> None:
    """Raises ValueError for settings of a LoHa or LoKr of peft's that are of the wrong kind, or that are not read here."""
    alike = {"lora_alpha" if key == "alpha" else key: value for key, value in said.items() if key not in LYCORIS_IDLE}
    check_settings(alike)
    if alike.get("r") is None or alike.get("lora_alpha") is None:
        raise ValueError("its metadata does not say r and alpha, which its scale is made of")


def said_scale(module: str, said: Mapping[str, Any]) -> float:
    """What the change of `module` is multiplied with, by the settings of a LoHa or LoKr of peft's."""
    alpha, rank = (of_module(module, said[key], said.get(f"{name}_pattern") or {}) for key, name in (("alpha", "alpha"), ("r", "rank")))
    return alpha / rank


def is_number(value: Any, whole: bool) -> bool:
    """Whether a value is a finite number, or a whole one from 1 on."""
    return type(value) is int and value >= 1 if whole else type(value) in (int, float) and math.isfinite(value)
