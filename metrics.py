"""
What a run measures as it trains: metrics.jsonl always; wandb, trackio or tensorboard beside it if asked for.
"""

import hashlib
import importlib
import json
import math

import torch
from safetensors import safe_open

import checkpoint
from configurator import UserError

REMEDY = {
    "wandb": "`wandb login` logs in, WANDB_MODE=offline does without",
    "trackio": "it writes to ~/.cache/huggingface/trackio, or to the folder in TRACKIO_DIR",
    "tensorboard": "its files go to the run's folder",
}

FILE = "metrics.jsonl"
QUANTITIES = {  # that pages draw, in words
    "val_loss": "validation loss, nats per token",
    "loss": "training loss, nats per token",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "signal_gini": "Gini coefficient of the recipes",
    "dead_signals": "share of dead signals",
    "basis_rank": "effective rank of the basis",
    "signal_change": "relative distance of the recipes from step 0",
}
MOST_POINTS = 300  # of a curve
SAMPLE = 2048  # recipes, evenly spaced, of the statistics of signals
DEAD = 0.01  # of the mean usage: a signal used less is dead


class SignalStatistics:
    """What training does to the signals of a vocabulary, for a row of metrics.jsonl at an evaluation.

    None of them depends on the data. They describe the learned factors: a rotation changes all but the
    effective rank, so they are no evidence that signals mean something.
    """

    def __init__(self, vocab, n_tokens, start=None):
        """`start`: the file of the weights of step 0; None: they are those of the vocabulary now."""
        self.vocab = vocab
        self.index = torch.linspace(0, n_tokens - 1, min(SAMPLE, n_tokens)).long()
        self.start = None
        if start is None:
            self.start = self.sample(self.factors()[0])
        elif start.exists() and hasattr(vocab, "recipe"):
            with safe_open(start, "pt") as weights:
                self.start = self.sample(weights.get_tensor("vocab.recipe"))

    def factors(self):
        """(recipes (V, S), basis (S, d)) as learned; of a sparse vocabulary without its dense part."""
        if hasattr(self.vocab, "recipe"):
            return self.vocab.recipe, self.vocab.basis
        n = self.vocab.n_signal
        return self.vocab.recipes()[:, :n], self.vocab.basis[:n]

    def sample(self, recipe):
        """The sampled rows of a recipe matrix (V, S), (n, S), fp32."""
        return recipe.detach()[self.index.to(recipe.device)].float()

    @torch.no_grad()
    def measure(self):
        """{name: value}.

        signal_gini: Gini coefficient of the sizes in a recipe, mean (Hurley & Rickard, 0811.4706).
        dead_signals: share of signals whose squared codes are below DEAD of the mean. basis_rank: effective
        rank of the basis, exp of the entropy of its singular values (Roy & Vetterli, 2007).
        signal_change: how far the recipes are from step 0, relative to their length there; None
        without a step 0.
        """
        recipes, basis = self.factors()
        recipes, basis = self.sample(recipes), basis.detach().float()
        change = None
        if self.start is not None:
            change = ((recipes - self.start.to(recipes)).norm() / self.start.norm()).item()
        if hasattr(self.vocab, "sparsify"):  # what a sparse vocabulary keeps of them
            recipes = self.vocab.sparsify(recipes)
        sizes, n = recipes.abs().sort(1).values, recipes.size(1)
        weight = (2 * torch.arange(1, n + 1, device=sizes.device) - n - 1) / n  # (S,)
        gini = (sizes @ weight / sizes.sum(1).clamp(min=1e-30)).mean()
        usage = recipes.square().mean(0) * basis.square().sum(1)  # (S,)
        singular = torch.linalg.eigvalsh(basis.T @ basis).clamp(min=0).sqrt()  # (d,)
        share = singular / singular.sum().clamp(min=1e-30)
        return {
            "signal_gini": gini.item(),
            "dead_signals": (usage < DEAD * usage.mean()).float().mean().item(),
            "basis_rank": torch.special.entr(share).sum().exp().item(),
            "signal_change": change,
        }


class Metrics:
    """The rows of a run up to step `start`, and those to come.

    `token` is a random text that the run keeps. UserError if the logger is not installed or refuses.
    """

    def __init__(self, run, logger, config, start, token):
        self.path, self.send, self.close = run / FILE, lambda row: None, lambda: None
        if logger != "none":
            try:
                self.send, self.close = connect(logger, run, config, start, tracker_id(run, token))
            except ImportError:
                raise UserError(f"--logger={logger} needs a package: pip install {logger}") from None
            except Exception as error:  # whatever a service can answer
                reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
                raise UserError(f"--logger={logger}: {reason}: {REMEDY[logger]}") from None
        # What lies after the start is computed again.
        kept = [row for row in rows(run) if row["step"] <= start and start]
        checkpoint.write_atomically(self.path, "".join(json.dumps(row) + "\n" for row in kept))

    def write(self, **row):
        row = {k: None if v is None or not math.isfinite(v) else v for k, v in row.items()}  # JSON has no NaN
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
        self.send(row)


def rows(run):
    """The rows of a run's metrics.jsonl, [] without it; a last line that a kill cut is passed over."""
    path = run / FILE
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def curves(run):
    """{quantity in words: [[step, value]]} of a run's rows, thinned to MOST_POINTS each."""
    table, found = rows(run), {}
    for key, words in QUANTITIES.items():
        points = [[row["step"], row[key]] for row in table if row.get(key) is not None]
        if len(points) > 1:
            found[words] = points[:: -(-len(points) // MOST_POINTS)]
    return found


def tracker_id(run, token):
    """A run's id at wandb: hexadecimal, its own on every machine (`token`) and in every copy (its path)."""
    return hashlib.sha256(f"{token} {run.resolve()}".encode()).hexdigest()[:16]


def connect(logger, run, config, start, id):
    """(send(row), close()) of a logger. Raises whatever that raises."""
    if logger == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        board = SummaryWriter(run / "tensorboard", purge_step=start + 1)

        def send(row):
            for key, value in row.items():
                if value is not None:
                    board.add_scalar(key, value, row["step"])

        return send, board.close
    tracker = importlib.import_module(logger)
    # trackio knows a run by its name, wandb by its id.
    names = {"name": run.name, "id": id, "dir": run} if logger == "wandb" else {"name": f"{run.name}-{id}"}
    tracker.init(project="reflow", config=config, resume="allow", **names)

    def send(row):
        tracker.log({key: value for key, value in row.items() if key != "step"}, step=row["step"])

    return send, tracker.finish
