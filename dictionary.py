"""
One embedding, many ways to write it: codes (V x S) @ atoms (S x d) = E.

A *dictionary* is such a pair. `native` is the learned one. For every invertible R, (recipes R)(R^-1 basis) is
the *same function*, so a result that also holds for `rotated` is not evidence about the learned signals.
`pca` and `ica` find a dictionary of E after the fact, and `sparse` one whose product is close to E.
"""

import warnings
from dataclasses import dataclass, field

import numpy as np
import torch
from tqdm import tqdm

from configurator import UserError
from hardware import one_thread, side_by_side

RANK = 1e-12  # of the largest squared singular value: smaller ones are rounding
VARIANCE = 1e-10  # of the largest variance: directions with less are not whitened, their rounding would grow
ICA_STEPS = 200


@dataclass
class Dictionary:
    """recipes (V, S) @ basis (S, d) = E, and the same with atoms of length 1.

    codes (V, S) are the recipes times the lengths of the basis rows: a code is a length in the residual
    stream. Changes of signals (`rotated`, `skewed`) act on the factors as they are in the model. Rotated
    *codes* would mix atoms of unlike length, so that native codes would stand out among them without axes.
    """

    name: str
    recipes: torch.Tensor
    basis: torch.Tensor
    fit: dict = field(default_factory=dict)  # how it was found: {quantity: value}

    def __post_init__(self):
        length = self.basis.norm(dim=1)  # (S,)
        self.codes = self.recipes * length
        self.atoms = self.basis / length.clamp(min=1e-30)[:, None]

    @property
    def n_signals(self):
        return len(self.atoms)

    @property
    def eighth(self):
        """An eighth of the signals, at least one: the size at which cut recipes are compared."""
        return max(1, self.n_signals // 8)

    def matrix(self):
        """E (V, d)."""
        return self.codes @ self.atoms

    def activations(self, h):
        """A (..., S) of normalised final states h (..., d): logits are A @ codes.T, exactly."""
        return h @ self.atoms.T

    def nearest_signals(self, s, k):
        """[[signal, cosine]] of the k other signals whose atoms are nearest to that of s, or its opposite."""
        cosine = self.atoms @ self.atoms[s]  # (S,)
        cosine[s] = 0
        near = cosine.abs().topk(min(k, self.n_signals)).indices.tolist()
        return [[i, cosine[i].item()] for i in near if i != s]

    def part(self, tokens):
        """The same dictionary of some tokens alone, ids (n,): codes (n, S)."""
        index = torch.as_tensor(tokens).to(self.codes.device)
        return Dictionary(self.name, self.recipes[index], self.basis)


def top_k(codes, k):
    """codes (..., S) with all but the k entries of largest size in each row set to zero; k > S keeps all."""
    index = codes.abs().topk(min(k, codes.size(-1)), dim=-1, sorted=False).indices
    return torch.zeros_like(codes).scatter(-1, index, codes.gather(-1, index))


def native(net):
    """The learned dictionary of a ReFlow; of a dense one, the coordinates of E. Padding rows are left out."""
    recipes = net.vocab.recipes().detach()[: net.config.n_tokens]
    basis = getattr(net.vocab, "basis", None)
    basis = torch.eye(net.config.n_embd, device=recipes.device) if basis is None else basis.detach()
    return Dictionary("native", recipes, basis)


def readable(net):
    """The learned signals of a ReFlow alone: `native` without a sparse vocabulary's core and mean."""
    d, n = native(net), net.config.signals
    return Dictionary(d.name, d.recipes[:, :n], d.basis[:n])


def random_orthogonal(n, generator):
    """An orthogonal matrix (n, n) with Haar measure (Mezzadri, math-ph/0609050), float64."""
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def rotated(dictionary, generator):
    """The dictionary after a uniformly random rotation of its signals: the gauge control."""
    q = random_orthogonal(dictionary.n_signals, generator).to(dictionary.recipes)
    return Dictionary("rotated", dictionary.recipes @ q, q.T @ dictionary.basis)


def gaussian_rows(rows, n, generator):
    """n random rows (n, d), fp32, with the covariance of rows (V, d)."""
    root = torch.linalg.cholesky(torch.cov(rows.T) + 1e-8 * torch.eye(rows.size(1)))
    return torch.randn(n, len(root), generator=generator) @ root.T


def skewed(dictionary, generator, condition=10.0):
    """The dictionary after a random *non-orthogonal* change of signals, which changes cosines, not E."""
    n = dictionary.n_signals
    stretch = torch.logspace(-0.5, 0.5, n, base=condition, dtype=torch.float64)
    u = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    v = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    change = ((u * stretch) @ v).to(dictionary.recipes)
    inverse = ((v.T / stretch) @ u.T).to(dictionary.recipes)
    return Dictionary("skewed", dictionary.recipes @ change, inverse @ dictionary.basis)


def principal_axes(E, fit):
    """(axes (r, d), variances (k,)): the k axes in which the rows `fit` of E (V, d) vary, then r - k others.

    Orthonormal, largest variance first. The others complete the row space of E: they are the same in all
    fitted rows, or only other tokens have them.
    """
    rows = E[fit] - E[fit].mean(0)
    variances, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))  # smallest first
    varies = variances > VARIANCE * variances[-1]
    energy = E.T @ E  # (d, d)
    still = vectors[:, ~varies]  # (d, d - k)
    seen, turn = torch.linalg.eigh(still.T @ energy @ still)
    others = still @ turn[:, seen > RANK * torch.linalg.eigvalsh(energy)[-1]]  # (d, r - k)
    axes = torch.cat([vectors[:, varies].flip(1), others.flip(1)], 1).T
    return axes, variances[varies].flip(0)


@one_thread()
def pca(E, fit):
    """Principal axes of the rows `fit` (token ids) of E (V, d): a dictionary of rank(E) atoms."""
    rows = E.cpu().double()
    axes, _ = principal_axes(rows, fit.cpu())
    return Dictionary("pca", (rows @ axes.T).to(E), axes.to(E))


@one_thread()
def ica(E, fit, seed=0):
    """Independent components of the rows `fit` of E (V, d) (FastICA; Hyvarinen, 1999).

    Independent axes of embeddings are interpretable (Yamagiwa et al., 2305.13175), so this is the rival that
    a learned basis has to beat. Axes in which the rows do not vary are atoms of their own. All runs on one
    thread: where the fit has not converged, rounding decides where it ends. `fit` of the result says how it
    went. Raises UserError if it fails.
    """
    from sklearn.decomposition import FastICA  # takes a second to import
    from sklearn.exceptions import ConvergenceWarning

    rows, fit = E.cpu().double(), fit.cpu()
    axes, variances = principal_axes(rows, fit)
    k = len(variances)
    z = rows @ axes.T  # (V, r)
    z[:, :k] /= variances.sqrt()
    white = (z[fit, :k] - z[fit, :k].mean(0)).numpy()  # (n, k)
    fast = FastICA(whiten=False, random_state=seed, max_iter=ICA_STEPS, tol=1e-3)
    for precision in (np.float32, np.float64):  # fp32 takes half the time; many axes may need more
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore", ConvergenceWarning)  # `fit` of the result says it
            try:
                u, s, v = np.linalg.svd(fast.fit(white.astype(precision)).components_.astype(float))  # (k, k)
            except (ValueError, np.linalg.LinAlgError) as error:
                reason = error
                continue
        if np.abs(s - 1).max() < 1e-2:
            break
        reason = "what it found is no rotation"
    else:
        raise UserError(f"ICA of this embedding failed: {reason}")
    turn = torch.from_numpy(u @ v)  # exactly orthogonal, so that its transpose undoes it
    z[:, :k] = z[:, :k] @ turn.T
    axes[:k] = turn @ (variances.sqrt()[:, None] * axes[:k])
    found = Dictionary("ica", z.to(E), axes.to(E))
    found.fit = {
        "rows": len(white),
        "axes without variance": len(axes) - k,
        "converged": fast.n_iter_ < ICA_STEPS,
        "iterations": fast.n_iter_,
        "reconstruction error": float((found.matrix() - E).abs().max() / E.abs().max()),
        "threads": 1,
    }
    return found


# ----------------------------------------------------------------------------------------------------
# Sparse codes


def pursue(rows, atoms, depth, worth=None, least=1, chunk=128):
    """Orthogonal matching pursuit of rows (V, d) in atoms (S, d) of length 1 (Pati et al., 1993).

    Returns (index, gain), each (V, depth): which atom a row takes at each step, and by how much that lowers
    the row's squared error. With `worth` (V,), a row that has `least` atoms may stop once a step gains less
    than that; the gains of the steps that it does not take are 0.
    """
    index = torch.zeros(len(rows), depth, dtype=torch.long)
    gain = rows.new_zeros(len(rows), depth)

    def pursue_part(start):
        part = torch.arange(start, min(start + chunk, len(rows)))
        rest = rows[part]  # (n, d), what is not explained yet
        frame = rest.new_empty(len(rest), depth, rest.size(1))  # (n, depth, d), the taken atoms, orthonormal
        for k in range(depth):
            fit = (rest @ atoms.T).abs_()  # (n, S)
            best = fit.scatter_(1, index[part, :k], -1.0).argmax(1)
            new = atoms[best, None]  # (n, 1, d)
            before = frame[:, :k]  # (n, k, d)
            new = torch.baddbmm(new, new @ before.mT, before, alpha=-1)[:, 0]  # (n, d)
            new = new / new.norm(dim=1, keepdim=True).clamp(min=1e-6)
            along = (rest * new).sum(1, keepdim=True)  # (n, 1)
            rest -= along * new
            frame[:, k] = new
            index[part, k] = best
            gain[part, k] = along[:, 0] ** 2
            if worth is not None and k + 1 >= least and (k + 1) % 4 == 0:
                goes_on = gain[part, k] >= worth[part]
                part, rest, frame = part[goes_on], rest[goes_on], frame[goes_on]
                if not len(part):
                    return

    side_by_side(pursue_part, range(0, len(rows), chunk))
    return index, gain


def share_out(gain, total, least):
    """How many steps each row of a pursuit keeps, (V,): those `total` of the matrix that gain most.

    gain (V, depth). A row keeps its first steps, and `least` of them in any case. A step is worth no more
    than the one before it: so the steps kept are the first ones. Returns also the worth of the last one.
    """
    worth = gain.cummin(1).values
    worth[:, :least] = torch.inf
    best = worth.flatten().topk(total)
    return torch.bincount(best.indices // gain.size(1), minlength=len(gain)), best.values[-1]


def least_squares(rows, atoms, index, n_kept, chunk=256):
    """Codes (V, S): the best coefficients of each row (V, d) in the first n_kept (V,) atoms of its index."""
    codes = rows.new_zeros(len(rows), len(atoms))
    gram = atoms @ atoms.T  # (S, S)

    def solve_part(start):
        part = slice(start, start + chunk)
        depth = int(n_kept[part].max())
        taken = index[part, :depth]  # (n, depth)
        kept = torch.arange(depth) < n_kept[part, None]  # (n, depth)
        both = kept[:, :, None] & kept[:, None]
        system = gram[taken[:, :, None], taken[:, None]] * both  # (n, depth, depth)
        system.diagonal(dim1=1, dim2=2)[:] += 1e-6 + (~kept).to(rows)  # no row is singular
        target = (rows[part] @ atoms.T).gather(1, taken) * kept  # (n, depth)
        found = torch.cholesky_solve(target[:, :, None], torch.linalg.cholesky(system))[:, :, 0]
        codes[part].scatter_add_(1, taken, found * kept)

    side_by_side(solve_part, range(0, len(rows), chunk))
    return codes


def encodings(rows, atoms, budgets, weights):
    """Codes (V, S) of rows (V, d) in atoms (S, d) of length 1, one after the other, for each of `budgets`.

    A budget is the number of entries a row, on average. A row gets entries by how much they lower the error
    that `weights` (V,) weigh, at most twice as many. One pursuit serves all budgets. A sixteenth of the rows
    tells beforehand what an entry must be worth, so that a row is followed little further than it is kept.
    """
    depth = min(2 * max(budgets), *atoms.shape)
    plans = [(min(n, depth), max(1, n // 8)) for n in budgets]  # entries a row on average and at least
    worth = None
    if len(rows) >= 16 * 64:
        few = slice(None, None, 16)
        _, gain = pursue(rows[few], atoms, depth)
        n, least = max(plans)
        _, last = share_out(gain * weights[few, None], n * len(gain), least)
        worth = 0.9 * last / weights.clamp(min=1e-30)
    index, gain = pursue(rows, atoms, depth, worth, max(plans)[1])
    for n, least in plans:
        n_kept, _ = share_out(gain * weights[:, None], n * len(rows), least)
        yield least_squares(rows, atoms, index, n_kept)


def encode(rows, atoms, n_nonzero, weights):
    """`encodings` for one budget: codes (V, S)."""
    return next(encodings(rows, atoms, [n_nonzero], weights))


def best_atoms(rows, codes, weights):
    """Atoms (S, d), not of length 1: weighted least squares for given codes (MOD; Engan et al., 1999)."""
    weighted = codes * weights[:, None]  # (V, S)
    system = codes.T @ weighted  # (S, S)
    system.diagonal()[:] += 1e-6 * system.diagonal().mean()
    return torch.linalg.solve(system, weighted.T @ rows)


def fit_of(rows, codes, atoms, weights):
    """How close codes (V, S) @ atoms come to rows (V, d): {quantity: value}."""
    missed = ((rows - codes @ atoms) ** 2).sum(1) @ weights
    return {
        "missed": float(missed / ((rows**2).sum(1) @ weights)),
        "nonzeros a row": float((codes != 0).sum() / len(codes)),
    }


def learn(rows, n_atoms, n_nonzero, weights, rounds, generator, report):
    """(codes (V, S), atoms (S, d), weighted squared error) from random rows as the first atoms.

    report() is called after each round.
    """
    drawn = torch.multinomial(weights, n_atoms, generator=generator)
    atoms = torch.nn.functional.normalize(rows[drawn], dim=1)
    for i in range(rounds):
        codes = encode(rows, atoms, n_nonzero, weights)
        atoms = best_atoms(rows, codes, weights)
        missed = ((rows - codes @ atoms) ** 2).sum(1) * weights  # (V,)
        if i < 3 * rounds // 4:
            # The weakest atom, or all that no row takes, become rows that are coded badly.
            energy = (codes**2 * weights[:, None]).sum(0) * (atoms**2).sum(1)  # (S,)
            weak = energy <= energy.min()
            atoms[weak] = rows[missed.topk(int(weak.sum())).indices]
        if i < rounds - 1:
            atoms = torch.nn.functional.normalize(atoms, dim=1)
        report()
    return codes, atoms, float(missed.sum())


@one_thread()
def sparse(E, n_atoms, n_nonzero, weights=None, seed=0, starts=3, rounds=20, most=None):
    """Sparse codes of the rows of E (V, d) in n_atoms atoms, n_nonzero to a row on average.

    Orthogonal matching pursuit and least-squares atoms in turn, from several random starts; the one with the
    least error is returned. The budget is one of the whole matrix: a row gets entries by how much they lower
    the error that `weights` (V,) weigh, for example by how often a token was seen. `most`: atoms are fitted
    to so many rows, those of the largest weights. codes @ atoms is close to E, not equal. `fit` of the
    result: the weighted share of E's energy that is missed, and the mean |cosine| of its atoms with their
    partners from the other starts. Raises UserError if there are too few rows.
    """
    rows = E.cpu().float()
    weights = torch.ones(len(rows)) if weights is None else weights.cpu().float()
    n_rows = min(int((weights > 0).sum()), most or len(rows))
    if n_rows < n_atoms:
        raise UserError(f"{n_atoms} atoms need as many rows with a weight, E has {n_rows}")
    some = weights.topk(min(most or len(rows), len(rows))).indices.sort().values
    found = []
    bar = tqdm(total=starts * rounds, desc="dictionary", unit="round", disable=None, leave=False)
    for start in range(starts):
        generator = torch.Generator().manual_seed(seed * 1000 + start)
        found.append(learn(rows[some], n_atoms, n_nonzero, weights[some], rounds, generator, bar.update))
    bar.close()
    codes, atoms, _ = best = min(found, key=lambda part: part[2])
    if len(some) < len(rows):
        atoms = torch.nn.functional.normalize(atoms, dim=1)
        codes = encode(rows, atoms, n_nonzero, weights)
    fit = {"starts": starts} | fit_of(rows, codes, atoms, weights)
    others = [partners(atoms, part[1]).mean() for part in found if part is not best]
    if others:
        fit["agreement of starts"] = float(np.mean(others))
    return Dictionary("sparse", codes.to(E), atoms.to(E), fit)


@one_thread()
def anchored(E, anchors, n_nonzero, weights):
    """Sparse codes of the rows of E (V, d) in some of its own rows, n_nonzero to a row on average.

    anchors (S,): the ids of these tokens, so that every signal has the name of a token. Budget and `weights`
    (V,) are those of `sparse`.
    """
    rows, weights = E.cpu().float(), weights.cpu().float()
    atoms = torch.nn.functional.normalize(rows[anchors], dim=1)
    codes = encode(rows, atoms, n_nonzero, weights)
    return Dictionary("anchors", codes.to(E), atoms.to(E), fit_of(rows, codes, atoms, weights))


def partners(a, b):
    """|cosine| of each row of a (n, d) with its partner in b (m, d), one to one, by the Hungarian method.

    Rows without a partner have 0. The same of columns: partners(a.T, b.T).
    """
    from scipy.optimize import linear_sum_assignment  # half a second to import

    a, b = (torch.nn.functional.normalize(x.double(), dim=1) for x in (a, b))
    cosine = (a @ b.T).abs().cpu().numpy()  # (n, m)
    ours, theirs = linear_sum_assignment(cosine, maximize=True)
    found = np.zeros(len(cosine))
    found[ours] = cosine[ours, theirs]
    return found
