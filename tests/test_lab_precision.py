"""Blocks in bf16: the model says nearly the same, all else stays fp32, and large models alone are rounded."""

from dataclasses import replace

import pytest
import torch

import hooks
from experiments.lab import Lab, LabConfig, Report, precision
from model import ReFlow
from tests.lab_fixtures import corpus, loud, save_run, tiny


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small untrained run whose blocks write much."""
    return save_run(
        tmp_path_factory.mktemp("out") / "run", loud(tiny()), corpus(tmp_path_factory.mktemp("data"))
    )


def open_as(run, dtype):
    return Lab(LabConfig(run=str(run), device="cpu", dtype=dtype))


def test_rounded_blocks_give_nearly_the_same_distribution_and_read_the_same_dictionary(run):
    fp32, bf16 = open_as(run, "fp32"), open_as(run, "bf16")
    x, _ = fp32.heldout(20, 12)
    whole, rounded = (hooks.log_probs(lab.model.net, lab.model.net.encode(x)) for lab in (fp32, bf16))
    assert 0 < hooks.kl(whole, rounded).max() < 1e-3
    assert rounded.dtype == torch.float64 and bf16.model.net.encode(x).dtype == torch.float32
    assert torch.equal(fp32.model.E, bf16.model.E)


def test_the_sum_over_signals_stays_exact(run):
    lab = open_as(run, "bf16")
    net, d = lab.model.net, lab.model.dictionary
    h = net.encode(lab.heldout(20, 12)[0]).detach()
    torch.testing.assert_close(d.activations(h) @ d.codes.T, hooks.unembed(net, h), rtol=1e-5, atol=1e-5)


def test_controls_are_rounded_as_the_model_is_and_the_result_says_so(run):
    lab = open_as(run, "bf16")
    subjects = [*lab.models.values(), lab.shuffled]
    assert len(subjects) == 4 and all(precision.is_rounded(subject.net) for subject in subjects)
    assert any("rounded to bf16" in note for note in Report(lab, "template", {}).result().notes)
    lab = open_as(run, "auto")  # a small model
    assert not any(precision.is_rounded(subject.net) for subject in lab.models.values())
    assert not any("rounded" in note for note in Report(lab, "template", {}).result().notes)


def test_auto_rounds_large_models_where_the_cpu_has_bf16(monkeypatch):
    def found(has_bf16):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_bf16})
        net = ReFlow(replace(tiny().config, n_layer=1))
        return precision.is_rounded(precision.rounded(net, "auto"))

    assert not found(True)
    monkeypatch.setattr(precision, "LARGE", 1e5)
    assert found(True) and not found(False)
