"""sparsity_profile: closed forms, planted signals found, verdicts that fail."""

import json

import numpy as np
import pytest
import torch
from lab_fixtures import corpus, open_lab, save_run, tiny

from experiments import lab, sparsity_profile


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """An untrained run with a dense one beside it: nothing is there to be found."""
    out = tmp_path_factory.mktemp("out")
    data = corpus(tmp_path_factory.mktemp("data"))
    save_run(out / "dense", tiny(vocab="dense"), data)
    return open_lab(save_run(out / "tiny", tiny(), data))


def planted(seed, sparse, v=400, s=16):
    """Recipes of one strong signal each, or Gaussian ones, which are alike in any rotation."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randn(v, s, generator=generator)
    if sparse:
        codes = 0.05 * codes
        codes[torch.arange(v), torch.arange(v) % s] = 1.0
    return lab.Dictionary("native", codes, torch.linalg.qr(torch.randn(s, s, generator=generator)).Q)


def verdicts(measure, lower):
    """(how often a planted sparse dictionary, a Gaussian one, is found special) in 20 seeds."""
    found = {}
    for sparse in (True, False):
        counted = 0
        for seed in range(20):
            d = planted(seed, sparse)
            generator = torch.Generator().manual_seed(100 + seed)
            turned = [measure(lab.rotated(d, generator), seed) for _ in range(lab.ROTATIONS)]
            counted += (
                lab.signals("", measure(d, seed), turned, {}, "prompts", lower=lower).verdict == "supported"
            )
        found[sparse] = counted
    return found[True], found[False]


def test_planted_signals_are_found_and_a_rotation_of_nothing_is_not():
    sparse, gaussian = verdicts(lambda d, seed: lab.gini(d.codes.numpy()), lower=False)
    assert sparse == 20 and gaussian <= 4  # 1 of 20 expected; more than 4 has a probability below 0.3 %


def test_active_share_of_a_gaussian_row():
    rows = np.random.default_rng(0).standard_normal((50, 4000))
    assert sparsity_profile.active(rows, 1.58) == pytest.approx(0.114, abs=3e-3)
    assert sparsity_profile.active(rows, 2.0) == pytest.approx(0.0455, abs=2e-3)
    assert sparsity_profile.hoyer(rows).mean() == pytest.approx(0.205, abs=0.01)
    assert sparsity_profile.participation(rows).mean() == pytest.approx(1 / 3, abs=0.01)


@pytest.mark.parametrize("script", [sparsity_profile])
def test_an_untrained_run_supports_nothing(script, room):
    """From the files to the verdicts: no effect and no signals where nothing was learned."""
    script.run(room).save()
    folder = room.folder / "experiments" / script.__name__.rpartition(".")[2]
    result = json.loads((folder / "result.json").read_text())
    kinds = {c["kind"]: c["verdict"] for c in result["claims"]}
    assert kinds == {"effect": "not supported", "signals": "not supported"}
    assert all((folder / f["file"]).stat().st_size > 10_000 for f in result["figures"])
    assert "baseline" in (folder / "rows.csv").read_text()
