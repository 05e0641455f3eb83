"""Golden models through the public interface: a checkpoint folder with the published names, and its loading."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pldr_train.model import PldrllmForCausalLM
from tests.conftest import Golden
from tests.oracle import Oracle, OracleSizes, total_loss

PLGA_PARTS = (".mha1.layernorm1.", ".mha1.reslayerAs.", ".mha1.plgatt_layer.")


def load_model(golden: Golden, folder: Path, kind: str | None = None, **kwargs: Any) -> PldrllmForCausalLM:
    """Write the golden checkpoint to `folder` and load it; `kind` names the predefined G, `None` learns it."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = golden.group("weights")
    if kind is not None:
        tensors = without_plga(tensors) | predefined_buffers(golden.group(f"predefined_{kind}")["G"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = golden.sizes()
    config = settings | {
        "model_type": "pldrllm",
        "architectures": ["PldrllmForCausalLM"],
        "hidden_size": settings["num_attention_heads"] * settings["head_dim"],
        "custom_G_type": kind,
        "reference_rope": True,
    }
    (folder / "config.json").write_text(json.dumps(config))
    model, loading = PldrllmForCausalLM.from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not any(loading.values()), loading
    return model


def without_plga(published: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the same model with a predefined G, which has no metric learner and no power law."""
    kept = {name: tensor for name, tensor in published.items() if not any(part in name for part in PLGA_PARTS)}
    assert 0 < len(kept) < len(published)
    return kept


def predefined_buffers(curvature: Tensor) -> dict[str, Tensor]:
    """The published buffers that hold a constant G (L, H, d, d)."""
    layers, heads, width, _ = curvature.shape
    values = torch.zeros(layers, 3, 1, heads, width, width)
    values[:, 2, 0] = curvature
    status = torch.ones(layers, dtype=torch.bool)
    return {"decoder.past_G_values": values, "decoder.past_G_values_status": status}


def load_oracle(golden: Golden, curvature: Tensor | None = None) -> Oracle:
    """The literal implementation with the golden weights."""
    sizes = golden.sizes()
    del sizes["max_position_embeddings"]
    oracle = Oracle(OracleSizes(**sizes, curvature=curvature))
    weights = golden.group("weights")
    oracle.load_state_dict(weights if curvature is None else without_plga(weights))
    return oracle


def exact_gradients(golden: Golden) -> dict[str, Tensor]:
    """Gradients of the golden loss in fp64, by published name."""
    oracle = load_oracle(golden).double()
    outputs = oracle(golden["input_ids"][:, :-1])
    total_loss(outputs, golden["input_ids"][:, 1:], golden.dag_coefficients).backward()
    return {name: parameter.grad for name, parameter in oracle.named_parameters() if parameter.grad is not None}
