"""The certificate says what happened, and says so when it did not look."""

import pytest
import torch

from modelwright.core.errors import UserError
from modelwright.core.model import certificate
from modelwright.core.model.certificate import certify, nats
from modelwright.core.model.checkpoint import Checkpoint


def test_a_model_against_itself_is_proven_equal(stories) -> None:
    c = certify(Checkpoint(stories), Checkpoint(stories))
    assert c.passed and c.max_abs_dlogit == 0 and c.loss_before == c.loss_after
    assert c.params_total == c.params_active == 260_032 and c.loads_in == "LlamaForCausalLM"


def test_a_changed_weight_is_caught(tiny, tmp_path) -> None:
    model = Checkpoint(tiny("llama")).model()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] += 0.05
    model.save_pretrained(tmp_path / "m")
    c = certify(Checkpoint(tiny("llama")), Checkpoint(tmp_path / "m"))
    assert c.passed is False and c.max_abs_dlogit > c.tolerance


def test_loss_is_the_model_s_own(stories) -> None:
    checkpoint = Checkpoint(stories)
    ids, size, _ = certificate.probe_ids(checkpoint)
    model = checkpoint.model()
    with torch.no_grad():
        want = float(model(input_ids=ids, labels=ids).loss)
    assert abs(certify(checkpoint, checkpoint).loss_before - want) < 1e-6
    logits = certificate.logits_of(model, ids)
    assert abs(nats(logits, ids) - want) < 1e-6 and size > 100


def test_bits_per_byte_of_a_uniform_model_is_known(tiny, tmp_path) -> None:
    """A model that gives every token the same probability has log2(V) bits per token."""
    model = Checkpoint(tiny("llama")).model()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.save_pretrained(tmp_path / "m")
    c = certify(Checkpoint(tmp_path / "m"), Checkpoint(tmp_path / "m"))
    assert c.loss_before == pytest.approx(torch.log(torch.tensor(96.0)).item(), abs=1e-5)
    assert c.bits_per_byte_before is None, "no tokenizer, no bytes"


def test_what_does_not_fit_in_memory_is_said(tiny, monkeypatch) -> None:
    class Full:
        available = 10_000

    monkeypatch.setattr(certificate.psutil, "virtual_memory", lambda: Full)
    c = certify(Checkpoint(tiny("llama")), Checkpoint(tiny("llama")))
    assert c.passed is None and c.max_abs_dlogit is None and "not compared" in c.note and "GB are free" in c.note


def test_different_vocabularies_are_refused(tiny) -> None:
    with pytest.raises(UserError, match="different vocabularies"):
        certify(Checkpoint(tiny("llama")), Checkpoint(tiny("llama", vocab_size=48)))


def test_encoder_decoder_and_encoder_models_are_measured_too(tiny) -> None:
    for kind in ("t5", "gpt2"):
        assert certify(Checkpoint(tiny(kind)), Checkpoint(tiny(kind))).passed
