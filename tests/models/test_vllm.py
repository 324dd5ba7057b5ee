"""What stands in for our classes in vLLM computes the same; importing it needs no vLLM, and what would be wrong is refused.

That a real vLLM gives the same text is shown by `make interop`.
"""

import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModel

import modelwright.models  # noqa: F401
from families import model_of
from modelwright.models import lora_moe, vllm
from modelwright.moe.lora import wrap


def lora_moe_of(kind: str) -> Any:
    """A random LoRAMoE whose experts and router all matter."""
    model = model_of(kind)
    names = [f"model.layers.{i}.{n}" for i in range(2) for n in ("self_attn.q_proj", "mlp.down_proj")]
    layers = wrap(model, names, experts=3, r=2, alpha=8.0)
    for layer in layers:
        for p in (layer.lora_A, layer.lora_B, layer.lora_route):
            torch.nn.init.normal_(p, std=0.5)
    return lora_moe.packed(model, names, layers[0]).eval()


@pytest.mark.parametrize("kind", list(lora_moe.CLASSES))
def test_the_served_backbone_of_a_lora_moe_gives_its_hidden_states(kind: str) -> None:
    whole = lora_moe_of(kind)
    served = vllm.backbone(type(whole.config))(whole.config).eval()
    assert served.load_state_dict(whole.model.state_dict(), strict=True)
    ids = torch.arange(3, 20)[None]
    assert torch.equal(served(ids).last_hidden_state, whole.model(ids).last_hidden_state)
    layers = [m for m in served.modules() if isinstance(m, vllm.ServedLayer)]
    assert len(layers) == 4 and not any(isinstance(m, torch.nn.Linear) for m in layers), "vLLM exchanges every nn.Linear"


def test_the_entry_point_registers_every_class_of_ours_once_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, str] = {}
    fake = ModuleType("vllm")
    fake.ModelRegistry = SimpleNamespace(register_model=found.__setitem__)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", fake)
    vllm.register()
    vllm.register()
    ours = {"RMoEForCausalLM", "HyperMoEForCausalLM", *(cls.__name__ for _, cls in lora_moe.CLASSES.values())}
    assert found.keys() == ours
    assert set(found.values()) == {f"modelwright.models.vllm:{n}" for n in ("TransformersMoEForCausalLM", "TransformersForCausalLM")}
    config = lora_moe.CLASSES["llama"][0](hidden_size=32, num_attention_heads=4, num_hidden_layers=1, vocab_size=8, intermediate_size=16)
    assert type(AutoModel.from_config(config)) is vllm.backbone(type(config))


@pytest.mark.parametrize(
    ("kind", "pipeline", "tensor", "words"),
    [
        ("rmoe", 2, 1, "several pipeline stages"),
        ("hyper_moe", 2, 1, "several pipeline stages"),
        ("lora_moe_llama", 1, 2, "merge: uniform"),
        ("lora_moe_llama", 1, 1, ""),
        ("rmoe", 1, 2, ""),
    ],
)
def test_what_would_run_wrongly_is_refused_with_what_to_do(kind: str, pipeline: int, tensor: int, words: str) -> None:
    config, parallel = SimpleNamespace(model_type=kind), SimpleNamespace(pipeline_parallel_size=pipeline, tensor_parallel_size=tensor)
    if not words:
        vllm.refuse(config, parallel)
        return
    with pytest.raises(ValueError, match=words):
        vllm.refuse(config, parallel)


@pytest.mark.slow
def test_importing_it_does_not_import_vllm() -> None:
    code = "import sys, modelwright.models.vllm\nassert 'vllm' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_names_the_entry_point() -> None:
    import tomllib
    from pathlib import Path

    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["vllm.general_plugins"] == {"modelwright": "modelwright.models.vllm:register"}
    assert callable(vllm.register)


def test_the_head_keeps_the_places_that_transformers_would() -> None:
    from transformers.modeling_utils import slice_logits_to_keep

    from modelwright.models.causal import _kept

    x = torch.randn(2, 5, 3)
    mask = torch.tensor([[1, 0, 1, 0, 0], [0, 0, 0, 1, 1]]).bool()
    for keep in (0, 1, 3, torch.tensor([1, 4]), torch.tensor([[0, 2], [4, 4]]), mask):
        assert torch.equal(_kept(x, keep).reshape(-1, 3), slice_logits_to_keep(x, keep).reshape(-1, 3))


def test_the_served_hypermoe_gives_the_hidden_states_and_leaves_no_linear_in_its_hypernetwork() -> None:
    from modelwright.models.hyper_moe import HyperMoEConfig, HyperMoEModel

    sizes = {"hyper_adapter": 4, "hyper_bottleneck": 8, "hyper_expert_embedding": 6, "hyper_process": 6, "hyper_code": 6}
    stock = model_of("mixtral").config.to_dict()
    config = HyperMoEConfig(**{k: v for k, v in stock.items() if k not in ("model_type", "architectures")}, **sizes)
    torch.manual_seed(0)
    whole = HyperMoEModel(config).eval()
    for p in whole.hyper.parameters():
        torch.nn.init.normal_(p, std=0.3)
    served = vllm.ServedHyperMoE(config).eval()
    served.load_state_dict(whole.state_dict(), strict=True)
    ids = torch.arange(3, 20)[None]
    assert torch.equal(served(ids).last_hidden_state, whole(ids).last_hidden_state)
    assert not any(isinstance(m, torch.nn.Linear) for m in served.hyper.modules())
