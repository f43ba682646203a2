"""Steering, editing: closed forms, planted directions, verdicts that fail; sample.py --steer."""

import functools
import subprocess
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

import sample
from configurator import UserError
from data.shards import Writer
from data.tokenizer import END_OF_TEXT, encode
from experiments import emotion_surgery, gene_tampering, lab
from tests.lab_fixtures import open_lab, save_run, tiny, token, words

COMMON = ["was", "is", "been", "seemed", "as", "found", "change", "argument", "country", "sounded"]
every_rotation = lab.Lab.rotations
SENTIMENT = lab.Lab.probe(None, "sentiment")


def sides():
    """The lists of positive and of negative words, built upon and held out."""
    return [SENTIMENT[p]["build"] + SENTIMENT[p]["held_out"] for p in ("positive", "negative")]


@functools.cache
def pairs():
    """Words in fixed pairs: the second always follows the first in the corpus."""
    used = {w for side in sides() for w in side} | set(COMMON)
    plain = [w for w in words(400) if w not in used]
    lists = [COMMON, plain, *sides()]
    return [pair for part in lists for pair in zip(part[::2], part[1::2], strict=False)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A corpus of word pairs in random order, the common words three times as often as others."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    times = [40 if pair[0] in COMMON else 12 for pair in pairs()]
    order = rng.permutation(np.repeat(np.arange(len(times)), times))
    writer = Writer(folder, source="pairs of words in random order", licence="none", recipe={})
    for i, part in enumerate(np.array_split(order, len(order) // 100)):
        split = "val" if i % 3 == 1 else "train"
        if writer.wants(split, i):
            line = "".join(f" {w}" for j in part for w in pairs()[j])
            writer.add(split, i, np.append(encode(line), END_OF_TEXT).astype("uint16"), len(line))
    writer.finish()
    return folder


def planted(turn=False):
    """Blocks that do nothing; a sentiment signal 0; the words of a pair alike; sparse recipes of length 1.

    `turn`: the same E and the same function, with the signals rotated at random.
    """
    model = tiny()
    generator = torch.Generator().manual_seed(1)
    codes = 0.02 * torch.randn(model.vocab.recipe.shape, generator=generator)
    for i, pair in enumerate(pairs()):
        for word in pair:
            own = torch.randint(1, 16, (1,), generator=generator)
            codes[token(word), 1 + i % 15] += 1.0
            codes[token(word), own] += 0.5
    for side, sign in zip(sides(), (1, -1), strict=True):
        codes[[token(w) for w in side], 0] = sign * 1.0
    used = sorted({token(w) for pair in pairs() for w in pair})
    codes[used] /= codes[used].norm(dim=1, keepdim=True)  # of equal rows none outdoes another along itself
    basis = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q if turn else torch.eye(16)
    with torch.no_grad():
        model.vocab.recipe.copy_(codes @ rotation)
        model.vocab.basis.copy_(rotation.T @ basis)
        for block in model.blocks:
            block.attn.o.weight.zero_()
            block.mlp.down.weight.zero_()
    return model


@pytest.fixture(scope="module")
def labs(data, tmp_path_factory):
    """Labs of a planted run, the same with its signals rotated, and an untrained run; a dense baseline."""
    folder = tmp_path_factory.mktemp("runs")
    dense = save_run(folder / "dense", tiny(3, vocab="dense"), data)
    models = {"planted": (planted(), 1), "turned": (planted(turn=True), 1), "untrained": (tiny(5), 0)}
    return {
        name: open_lab(save_run(folder / name, model, data, step), dense)
        for name, (model, step) in models.items()
    }


@pytest.fixture(scope="module")
def reports(labs):
    """Reports of the two experiments on the three runs; figures of the first only, since they are slow."""
    found = {}
    for module in (emotion_surgery, gene_tampering):
        for name, laboratory in labs.items():
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(module, "NEW_TOKENS", 1, raising=False)
                if name != "planted":
                    patch.setattr(module, "SIDES", {"both": (True, True)}, raising=False)
                    patch.setattr(module, "figures", lambda *_: None)
                    patch.setitem(laboratory.__dict__, "baseline", None)
                if name == "untrained":  # only claims of an effect are of interest
                    patch.setattr(lab.Lab, "rotations", lambda self, s: islice(every_rotation(self, s), 1))
                found[module, name] = module.run(laboratory)
    return found


def verdicts(report):
    return [claim.verdict for claim in report.claims]


# -- emotion surgery


def test_the_direction_in_recipes_is_that_of_embeddings(labs):
    subject = labs["turned"].reflow
    chosen = torch.arange(20).view(2, 10)
    v = emotion_surgery.direction(subject.dictionary, chosen)
    torch.testing.assert_close(v, subject.E[chosen[0]].mean(0) - subject.E[chosen[1]].mean(0))
    every = emotion_surgery.direction(subject.dictionary, chosen, 16)
    torch.testing.assert_close(v, every)


def test_slopes_and_tilts_by_hand():
    strengths = (-2.0, -1.0, 1.0, 2.0)
    y = np.array([3 * s + 7 for s in strengths])
    assert emotion_surgery.slope(y[:, None], strengths) == pytest.approx(3)
    logits = np.log(np.array([[[2.0, 4.0], [1.0, 1.0]]]))  # (1, 2, n)
    assert emotion_surgery.tilt(logits) == pytest.approx(np.log(3))


def test_diff_mean_at_the_embedding_is_the_direction(labs):
    """The stream entering block 0 is E of the word, whatever came before."""
    subject = labs["untrained"].reflow
    chosen = torch.arange(40, 60).view(2, 10)
    found = emotion_surgery.diff_mean(subject.net, [[1, 2, 3], [4, 5]], chosen, 0)
    torch.testing.assert_close(found, emotion_surgery.direction(subject.dictionary, chosen))


def test_fluency_of_known_text():
    net = tiny()
    prompts, texts = [[1, 2], [3, 4, 5]], [[6, 7, 6, 7], [8, 9]]
    found = emotion_surgery.fluency(net, prompts, texts)
    rows = [
        lab.logits(net, net.encode(torch.tensor([p + t])))[0] for p, t in zip(prompts, texts, strict=True)
    ]
    rows = [row.double().log_softmax(-1) for row in rows]
    losses = [-rows[0][i + 1, t] for i, t in enumerate(texts[0])] + [
        -rows[1][i + 2, t] for i, t in enumerate(texts[1])
    ]
    assert found["loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    assert found["distinct-2"] == pytest.approx(3 / 4)
    assert emotion_surgery.harmonic(0.5, 1.0) == pytest.approx(2 / 3)
    assert emotion_surgery.harmonic(-0.1, 1.0) == 0


def test_a_planted_sentiment_signal_steers(reports):
    report = reports[emotion_surgery, "planted"]
    assert verdicts(report)[0] == "supported"
    assert (
        report.claims[2].reason.startswith(("beats 19", "random")) and report.numbers["slope"]["native"] > 0.5
    )
    assert "beats 19 rotations" in report.claims[2].reason
    assert report.numbers["anti_steerable_share"]["native"] == 0
    assert [figure["file"] for figure in report.figures] == ["surgery.png"]


def test_rotated_signals_steer_no_better_than_rotations(reports):
    """The very same function: only the claim about signals may change."""
    report = reports[emotion_surgery, "turned"]
    assert verdicts(report)[0] == "supported" and verdicts(report)[2] == "not supported"
    same = reports[emotion_surgery, "planted"].numbers["slope"]["native"]
    assert report.numbers["slope"]["native"] == pytest.approx(same, rel=1e-3)


def test_an_untrained_model_has_no_sentiment(reports, labs):
    assert verdicts(reports[emotion_surgery, "untrained"])[0] == "not supported"
    laboratory = labs["untrained"]
    chosen = (
        emotion_surgery.word_pairs(laboratory, "build"),
        emotion_surgery.word_pairs(laboratory, "held_out"),
    )
    prompts = [encode(t).tolist() for t in SENTIMENT["templates"]["test"][:4]]
    false = 0
    for seed in range(20):
        subject = lab.Subject("seed", tiny(seed, n_layer=1), None)
        noise = torch.randn(16, generator=torch.Generator().manual_seed(seed))
        found = [
            emotion_surgery.by_word(emotion_surgery.dose_response(subject, prompts, v, [0], chosen[1]))
            for v in (emotion_surgery.direction(subject.dictionary, chosen[0]), noise)
        ]
        false += lab.effect("", found[0], {"random": found[1]}, "").verdict == "supported"
    assert false <= 3  # of 20, each with a chance of 2.5 %


# -- gene tampering


def test_a_swap_at_the_output_exchanges_logits_and_at_the_input_renames(labs):
    subject = lab.Subject("seed", tiny(2), None)
    old = torch.tensor([5, 6])
    texts = torch.tensor([[[1, 2, 3, 5]], [[9, 8, 7, 6]]])  # (n, C, T + 1)
    change = gene_tampering.exchange(subject.dictionary, old, old.flip(0))
    plain = lab.with_matrix(subject.net, subject.E)
    before = gene_tampering.said(plain, texts, old, old.flip(0))
    output = gene_tampering.edit(subject, old, change, "output")
    np.testing.assert_allclose(gene_tampering.said(output, texts, old, old.flip(0)), -before, atol=1e-5)
    renamed = texts.clone()
    renamed[:, 0, -1] = old.flip(0)
    aim, after_old = (gene_tampering.follow(plain, t) for t in (renamed, texts))
    edited = gene_tampering.edit(subject, old, change, "input")
    gain = gene_tampering.meant(aim, after_old, gene_tampering.follow(edited, texts))
    whole = (aim.exp() * (aim - after_old)).sum(-1)  # all of KL(aim || before)
    torch.testing.assert_close(gain, whole, atol=1e-5, rtol=1e-4)
    assert gene_tampering.said(edited, texts, old, old.flip(0)) == pytest.approx(before, abs=1e-5)


def test_no_edit_does_no_damage():
    subject = lab.Subject("seed", tiny(2), None)
    plain, x = lab.with_matrix(subject.net, subject.E), torch.arange(12).view(2, 6)
    base = lab.log_p(plain, plain.encode(x))
    rows, none = torch.tensor([50, 60]), torch.zeros(2, 16)
    loss, kl = gene_tampering.damage(gene_tampering.edit(subject, rows, none), x, x, base)
    assert loss.abs().max() < 1e-6 and kl.abs().max() < 1e-6
    loss, kl = gene_tampering.damage(gene_tampering.edit(subject, rows, 50 + none, "output"), x, x, base)
    assert kl.min() >= 0 and kl.max() > 1e-3


def test_contexts_end_in_their_tokens(labs):
    laboratory = labs["planted"]
    rng = np.random.default_rng(0)
    windows = laboratory.heldout(500, 32)
    tokens, texts = gene_tampering.find_contexts(*windows, laboratory.known_tokens(), 10, rng)
    assert len(set(tokens)) == 10 and texts.shape == (10, gene_tampering.CONTEXTS, gene_tampering.LENGTH + 1)
    assert (texts[:, :, -1].numpy() == tokens[:, None]).all()


def test_edits_of_planted_recipes_work_and_of_untrained_ones_do_not(reports):
    report = reports[gene_tampering, "planted"]
    assert verdicts(report)[:2] == ["supported", "supported"]
    assert "beats 19 rotations" in report.claims[2].reason
    edits = report.numbers["edits"]
    assert edits["reflow, swap, input"]["KL, text without"] < 1e-6  # no token of it was read
    assert edits["reflow, add, output"]["tilt, nats"] == pytest.approx(0, abs=1e-6)
    assert [figure["file"] for figure in report.figures] == ["edits.png"]
    assert verdicts(reports[gene_tampering, "untrained"])[:2] == ["not supported"] * 2
    assert verdicts(reports[gene_tampering, "turned"]) == ["supported", "supported", "not supported"]


# -- sample.py --steer


def test_steering_is_read():
    model = tiny()
    items = sample.read_steering("+joy:4@0-2, -s7:.5@1,+peace:2@0", model)
    assert [(strength, list(layers)) for _, strength, layers in items] == [
        (4, [0, 1, 2]),
        (-0.5, [1]),
        (2, [0]),
    ]
    torch.testing.assert_close(items[0][0], model.vocab.matrix()[token("joy")])
    torch.testing.assert_close(items[1][0], model.vocab.basis[7])


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "not like"),
        ("joy:4@0", "not like"),
        ("+joy:four@0", "not like"),
        ("+joy@0", "not like"),
        ("+joy:1@0,", "not like"),
        ("+joy:1@3", "from 0 to 2"),
        ("+joy:1@2-1", "from 0 to 2"),
        ("+s16:1@0", "s0 to s15"),
        ("+antidisestablishment:1@0", "tokens: take a word"),
    ],
)
def test_mistakes_are_one_line(text, match):
    with pytest.raises(UserError, match=match) as error:
        sample.steered(tiny(), text)
    assert "\n" not in str(error.value)


def test_a_plain_gpt_is_steered_by_words_alone():
    model = tiny(vocab="dense")
    assert len(sample.read_steering("+joy:1@0", model)) == 1
    with pytest.raises(UserError, match="no signals"):
        sample.read_steering("+s1:1@0", model)


def test_strength_zero_changes_nothing_and_a_word_raises_its_logit():
    model, idx = tiny(), torch.arange(30).view(3, 10)
    model.vocab.recipe.data[token("joy")] *= 10
    plain = model(idx)[0]
    with sample.steered(model, "+joy:0@0-2,-s3:0@1"):
        assert torch.equal(model(idx)[0], plain)
    with sample.steered(model, "+joy:8@2"):
        pushed = model(idx)[0]
    assert (pushed[..., token("joy")] > plain[..., token("joy")]).all()
    assert (pushed.argmax(-1) == token("joy")).float().mean() > 0.5
    assert torch.equal(model(idx)[0], plain)  # and it ends


@pytest.mark.parametrize("vocab", ["factored", "topk", "dense"])
def test_cached_and_uncached_generation_agree_under_steering(vocab):
    model = tiny(1, vocab=vocab, **({"top_k": 4} if vocab == "topk" else {}))
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    with sample.steered(model, "+joy:0.7@0-1,-peace:0.5@1"):
        cached = model.generate(prompts, 12, temperature=0)
        assert cached == model.generate(prompts, 12, temperature=0, use_cache=False)
        assert cached == [model.generate([p], 12, temperature=0)[0] for p in prompts]
    assert cached != model.generate(prompts, 12, temperature=0)


def test_the_script_steers_and_stays_light_without(labs, monkeypatch, capsys):
    run = f"--run={labs['planted'].folder}"
    arguments = ["sample.py", run, "--device=cpu", "--dtype=fp32", "--num_samples=2", "--max_new_tokens=5"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--temperature=0", "--steer=+country:30@2"])
    sample.main()
    assert capsys.readouterr().out.count(" country" * 5) == 2
    code = "import sys, sample; sample.main(); assert not {'experiments', 'scipy'} & set(sys.modules)"
    root = Path(sample.__file__).parent
    subprocess.run([sys.executable, "-c", code, *arguments[1:]], cwd=root, check=True, capture_output=True)
