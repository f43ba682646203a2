"""
What a run measures as it trains: metrics.jsonl always; wandb, trackio or tensorboard beside it if asked for.
"""

import hashlib
import importlib
import json
import math

import checkpoint
from configurator import UserError

REMEDY = {
    "wandb": "`wandb login` logs in, WANDB_MODE=offline does without",
    "trackio": "it writes to ~/.cache/huggingface/trackio, or to the folder in TRACKIO_DIR",
    "tensorboard": "its files go to the run's folder",
}


class Metrics:
    """The rows of a run up to step `start`, and those to come.

    `token` is a random text that the run keeps. UserError if the logger is not installed or refuses.
    """

    def __init__(self, run, logger, config, start, token):
        self.path, self.send, self.close = run / "metrics.jsonl", lambda row: None, lambda: None
        if logger != "none":
            try:
                self.send, self.close = connect(logger, run, config, start, tracker_id(run, token))
            except ImportError:
                raise UserError(f"--logger={logger} needs a package: pip install {logger}") from None
            except Exception as error:  # whatever a service can answer
                reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
                raise UserError(f"--logger={logger}: {reason}: {REMEDY[logger]}") from None
        rows = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        # What lies after the start is computed again; a kill may have cut the last line.
        kept = [row for row in rows if row.endswith("}") and json.loads(row)["step"] <= start and start]
        checkpoint.write_atomically(self.path, "".join(row + "\n" for row in kept))

    def write(self, **row):
        row = {k: None if v is None or not math.isfinite(v) else v for k, v in row.items()}  # JSON has no NaN
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
        self.send(row)


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
