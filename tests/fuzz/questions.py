"""What is asked of a model, at random, and how the answer is held against the truth."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from bench import Bench
from torch import Tensor
from truth import Truth, plainly

import dla_hooks

UNITS = ["component", "layer", "head"]
WAYS = ["once", "once", "once", "twice", "plan", "plan", "many", "stacks", "neurons", "unchecked"]
WAYS += ["direction", "direction", "sets", "compare"]


class Wrong(Exception):
    """An answer that is not the truth."""


@dataclasses.dataclass
class Question:
    """One question, in the library's own words and in plain numbers.

    Attributes:
        way: by which of the public functions it is asked.
        unit: as the library takes it.
        pos: likewise.
        columns: for each row of the batch the columns that are meant.
        answer: token ids by batch row and column.
        incorrect: likewise, or None.
        given: both, as the library takes them.
        center: whether the vocabulary's mean is taken off.
        chunk: chunk_size.
    """

    way: str
    unit: Any
    pos: Any
    columns: list[list[int]]
    answer: Tensor
    incorrect: Tensor | None
    given: tuple[Any, Any]
    center: bool
    chunk: int | None

    def __repr__(self) -> str:
        rest = f", center={self.center}, chunk={self.chunk}"
        return f"{self.way}: unit={self.unit}, pos={self.pos!r}, tokens={self.given}{rest}"


def question_of(bench: Bench) -> Question:
    rng, mask = bench.random, bench.mask
    batch, length = bench.ids.shape
    way = rng.choice(WAYS)
    unit = rng.choice([*UNITS, "head", tuple(UNITS), ("head", "component"), "fold", "mapping"])
    if unit == "fold":
        unit = dla_hooks.Heads(fold_value_biases=True)
    elif unit == "mapping":
        unit = {"a": dla_hooks.Heads(fold_value_biases=True), "b": "head"}
    real = [list(range(length))] * batch
    if mask is not None:
        real = [row.nonzero()[:, 0].tolist() for row in mask]
    shortest = min(map(len, real))
    kind = rng.choice(["last", "last", "int", "None", "None", "slice", "tuple", "list", "bools"])
    if way == "many" and kind == "bools":
        kind = "list"
    a = rng.randrange(shortest)
    b = rng.randint(a + 1, shortest)
    pos: Any = {
        "last": -1,
        "int": rng.choice([a, a - shortest]),
        "None": None,
        "slice": slice(a, rng.choice([b, None])),
        "tuple": (a, b),
        "list": [a, b - 1, -1],
        "bools": torch.tensor([i in (a, b - 1) for i in range(length)]),
    }[kind]
    if kind == "None":
        columns = [list(range(length))] * batch
    else:
        picked = list(range(shortest))
        if kind in ("last", "int"):
            picks = [[row[pos]] for row in real]
        elif kind in ("slice", "tuple"):
            picks = [row[pos if kind == "slice" else slice(a, b)] for row in real]
        else:
            wanted = pos if kind == "list" else [i for i in picked if i in (a, b - 1)]
            picks = [[row[i] for i in wanted] for row in real]
        columns = picks
    width = max(map(len, columns))
    vocab = bench.root.config.vocab_size
    form = rng.choice(["int", "int", "tensor", "list", "entries"])
    if way == "many":
        form = "int"
    elif form == "entries" and kind not in ("None", "last", "int"):
        form = "list"
    pairs = []
    for _ in range(rng.choice([1, 2])):
        if form in ("int", "tensor"):
            one = rng.randrange(vocab)
            pairs.append(
                (torch.full((batch, width), one), one if form == "int" else torch.tensor(one))
            )
        elif form == "list":
            row = [rng.randrange(vocab) for _ in range(batch)]
            pairs.append((torch.tensor(row)[:, None].expand(batch, width), row))
        else:
            ids = torch.randint(vocab, (batch, width), generator=bench.generator)
            pairs.append((ids, ids))
    if len(pairs) == 1:
        pairs.append((None, None))
    (answer, given), (incorrect, given_incorrect) = pairs
    chunk = rng.choice([None] * 6 + [1, 3])
    center = rng.random() < 0.15
    return Question(
        way, unit, pos, columns, answer, incorrect, (given, given_incorrect), center, chunk
    )


# Asking


def ask(bench: Bench, question: Question, plan: Any = None) -> Any:
    """Ask once; a plan where there is one."""
    with bench.running():
        given: dict[str, Any] = {"pos": question.pos, "attention_mask": bench.mask}
        if not bench.positional:
            given["chunk_size"] = question.chunk
        if plan is not None:
            return plan(bench.ids, **given)
        if question.way == "unchecked":
            given["check"] = False
        return dla_hooks.direct_logit_attribution(
            bench.model, bench.ids, *question.given, **_options(question), **given
        )


def prepared(bench: Bench, question: Question) -> Any:
    with bench.running():
        return dla_hooks.prepare(bench.model, *question.given, **_options(question))


def _options(question: Question) -> dict[str, Any]:
    return {"unit": question.unit, "center_unembed": question.center or None}


# Judging


def hold(bench: Bench, question: Question, result: Any, truth: Truth) -> str:
    """Hold a result against the truth: every sum, and every row where there is a formula for it.

    Returns:
        "right", or "right in sum".

    Raises:
        Wrong: saying what.
    """
    units = question.unit if isinstance(question.unit, tuple) else None
    if isinstance(question.unit, dict):
        units = tuple(question.unit)
    results = [result] if units is None else [result[unit] for unit in units]
    said = {_hold_one(bench, question, one, truth) for one in results}
    return "right in sum" if "right in sum" in said else "right"


def _hold_one(bench: Bench, question: Question, result: Any, truth: Truth) -> str:
    values = result.attribution.double()
    single = isinstance(question.pos, int) and not isinstance(question.pos, bool)
    if single:
        values = values[..., None]
    batch, width = values.shape[1:]
    rows, entries, cols = [], [], []
    on_the_left = bench.mask is not None and not bool(bench.mask[:, 0].all())
    for row, picked in enumerate(question.columns):
        shift = width - len(picked) if on_the_left else 0
        for entry, column in enumerate(picked):
            if bench.mask is None or bench.mask[row, column]:
                rows.append(row)
                entries.append(entry + shift)
                cols.append(column)
    at, seen = (rows, cols), (slice(None), rows, entries)
    answer = question.answer[rows, entries]
    wrong = None if question.incorrect is None else question.incorrect[rows, entries]
    index = torch.arange(len(rows))
    centred = question.center and wrong is None and result.softcap is None

    def picked(logits: Tensor) -> Tensor:
        here = logits[at]
        found = here[index, answer]
        if wrong is not None:
            return found - here[index, wrong]
        masked = here == -torch.inf  # they have no part in the mean
        mean = here.masked_fill(masked, 0).sum(-1) / (~masked).sum(-1)
        return found - mean if centred else found

    own = torch.full((batch, width), float("nan"), dtype=torch.float64)
    other = values.sum(0)
    own[rows, entries] = 0
    if bool((other.isnan() != own.isnan()).any()):
        raise Wrong(f"NaN stands elsewhere than at padding: {other.tolist()}")

    logit = (result.logit[..., None] if single else result.logit)[rows, entries].double()
    bias = (result.bias[..., None] if single else result.bias).expand(batch, width)[rows, entries]
    values = values[seen]
    whole = values[-1] if result.unit == "layer" else values.sum(0)
    size = max(truth.size, float(values.abs().max()))
    allowed = _allowed(bench) * size
    _close("rows and bias against the logit", whole + bias, logit, allowed)
    _close("the logit against the model's own", logit, picked(truth.logits), allowed)
    cap = result.softcap
    if wrong is None and not centred:
        capped = logit if cap is None else cap * torch.tanh(logit / cap)
        _close("the logit against what the model returns", capped, picked(truth.final), allowed)

    expected = truth.rows(result.unit)
    if expected is None:
        return "right in sum"
    folded = isinstance(question.unit, (dla_hooks.Heads, dict))
    if folded:
        return "right"  # no formula is needed: the sums are held
    here = _comparable(dict(zip(result.labels, values, strict=True)), expected)
    allowed *= 3  # norms and matrices by formula, in float64
    for label, logits in expected.items():
        if label not in here and (result.unit == "head" or label.endswith("_mid")):
            continue  # pruned heads have no row; nor has the middle of a parallel block
        due = picked(logits)
        got = here.get(label, torch.zeros_like(due))
        known = ~due.isnan()
        _close(f"row {label}", got[known], due[known], allowed)
    return "right"


def _comparable(rows: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """What hooks wrote to the embeddings, in the row that the truth has it in."""
    if "embed_hook" in expected or "embed_hook" not in rows:
        return rows
    return {**rows, "embed": rows["embed"] + rows["embed_hook"]}


def _close(what: str, got: Tensor, due: Tensor, allowed: float) -> None:
    gap = (got.double() - due.double()).abs()
    same = (got == due) | (gap <= allowed)
    if not bool(same.all()):
        worst = int(gap.nan_to_num(nan=1e300).argmax())
        raise Wrong(
            f"{what}: {float(got.flatten()[worst]):.6g} where {float(due.flatten()[worst]):.6g} is "
            f"right ({allowed:.1g} allowed)"
        )


def _allowed(bench: Bench) -> float:
    """Of the logits' spread: twice what the library promises for the coarsest dtype."""
    eps = max(torch.finfo(p.dtype).eps for p in bench.root.parameters())
    with bench.running():
        if torch.is_autocast_enabled("cpu"):
            eps = max(eps, torch.finfo(torch.bfloat16).eps)
    return 0.06 if eps > 1e-3 else 3e-4 if eps > 1e-10 else 3e-5


# The other ways of asking


def hold_many(bench: Bench, question: Question) -> str:
    """Prompts of different lengths in one sweep, each against the model's run on it alone."""
    rng = bench.random
    prompts = [bench.ids[rng.randrange(len(bench.ids)), : rng.randint(1, 9)] for _ in range(4)]
    prompts = [one.tolist() for one in prompts]
    pos = question.pos if question.pos in (-1, None) else -1
    options = _options(question)
    if isinstance(question.unit, (tuple, dict)):  # it takes one
        options["unit"] = rng.choice(UNITS)
    with bench.running():
        found = list(
            dla_hooks.attribute_many(
                bench.model, prompts, *question.given, pos=pos, max_tokens=20, **options
            )
        )
    said = {"right"}
    for ids, result in zip(prompts, found, strict=True):
        if isinstance(result, dla_hooks.DLAError):
            raise result
        logits = plainly(bench, torch.tensor([ids]), None).double()[0]
        results = result.values() if isinstance(result, dict) else [result]
        for one in results:
            total = one.total().double() + one.bias
            at = slice(None) if pos is None else -1
            got = one.logit.double().flatten()
            token, wrong = question.given
            size = max(float(got.abs().max()), float(one.attribution.abs().max()), 1.0)
            if one.softcap is not None or question.center:
                _close("rows and bias", total.flatten(), got, _allowed(bench) * size)
                continue
            due = logits[at, token] - (0 if wrong is None else logits[at, wrong])
            spread = logits.amax() - logits.amin()
            allowed = _allowed(bench) * max(float(spread), float(one.attribution.abs().max()))
            _close("the logit of a prompt of many", got, due.flatten(), allowed)
            _close("rows and bias of a prompt of many", total.flatten(), got, allowed)
    return said.pop()


def hold_stacks(bench: Bench, question: Question, truth: Truth) -> str:
    """The primitives: the stack against what entered the stream, and its logits."""
    given: dict[str, Any] = {"attention_mask": bench.mask, "pos_slice": None}
    running = bench.random.random() < 0.3
    verb = dla_hooks.accumulated_resid if running else dla_hooks.decompose_resid
    with bench.running():
        middle = {"incl_mid": True} if running and bench.chosen(False, True) else {}
        stack, labels = verb(bench.model, bench.ids, return_labels=True, **middle, **given)
    token, wrong = question.given
    if not isinstance(token, int):
        token, wrong = 5, None
    with bench.running():
        attrs = dla_hooks.logit_attrs(bench.model, bench.ids, stack, token, wrong, **given)
    if stack.shape[1:3] != bench.ids.shape and bench.mask is None:
        raise Wrong(f"the stack has shape {list(stack.shape)}")
    real = torch.ones_like(bench.ids, dtype=torch.bool) if bench.mask is None else bench.mask.bool()
    stack, attrs = stack.double(), attrs.double()
    if truth.to_logits is None:
        return "right in sum"
    expected = dict(truth.streams if running else truth.written)
    if "embed_hook" in expected and "embed_hook" not in labels:  # in the row of the embeddings
        expected["embed"] = expected["embed"] + expected.pop("embed_hook")
    size = max(float(x[real].abs().max()) for x in truth.written.values())
    here = _comparable(dict(zip(labels, stack, strict=True)), expected)
    for label, due in expected.items():
        if label.endswith("_mid") and label not in here:
            continue
        if label == "final_hook" and label not in here:
            due = due * 0  # behind the stream
        got = here.get(label, torch.zeros_like(due))
        _close(f"vector {label}", got[real], due[real], 3 * _allowed(bench) * size)
    if running or any(bool(x[real].any()) for x in truth.behind.values()):
        return "right"  # what hooks do behind the stream is no vector of it
    due = truth.to_logits(stack.sum(0))
    due = due[..., token] - (0 if wrong is None else due[..., wrong])
    allowed = 3 * _allowed(bench) * max(truth.size, float(attrs[:, real].abs().max()))
    _close("the stack's logits", attrs.sum(0)[real], due[real], allowed)
    return "right"


def hold_neurons(bench: Bench, truth: Truth) -> str:
    """The neurons of each layer, against what its MLP wrote: they differ by a bias."""
    given: dict[str, Any] = {"attention_mask": bench.mask, "pos_slice": None}
    with bench.running():
        stack, labels = dla_hooks.stack_neuron_results(
            bench.model, bench.ids, return_labels=True, incl_remainder=True, **given
        )
    real = torch.ones_like(bench.ids, dtype=torch.bool) if bench.mask is None else bench.mask.bool()
    if truth.to_logits is None:
        return "right in sum"
    size = max(float(x[real].abs().max()) for x in truth.written.values())
    layers = [label.partition("N")[0] for label in labels]
    for number, block in enumerate(bench.blocks):
        mine = [n for n, layer in enumerate(layers) if layer == f"L{number}"]
        if not mine or block.post_mlp is not None:
            continue
        bias = (truth.written[f"{number}_mlp_out"] - stack[mine].sum(0).double())[real]
        allowed = 3 * _allowed(bench) * size
        _close(f"neurons of layer {number}", bias, bias[:1].expand_as(bias), allowed)
    whole = truth.streams["final_post"][real]
    _close("neurons and remainder", stack.sum(0).double()[real], whole, 3 * _allowed(bench) * size)
    return "right"


def hold_direction(bench: Bench, question: Question, truth: Truth) -> str:
    """A direction in a stream part of the way up: what the block there read, and who wrote it."""
    labels = [label for label in truth.streams if label != "0_mid"]
    if not labels:
        return "right in sum"
    at, unit = bench.chosen(*labels), bench.random.choice([*UNITS, "neuron"])
    stream = truth.streams[at]
    v = torch.randn(stream.shape[-1], generator=bench.generator, dtype=torch.float64)
    target = dla_hooks.Direction(v, at)
    bench.said.append(f"{target}, unit={unit}")
    with bench.running():
        found = dla_hooks.direct_logit_attribution(
            bench.model, bench.ids, target, unit=unit, pos=None, attention_mask=bench.mask
        )
    real = _real(bench)
    size = float((stream[real].abs() @ v.abs()).max())
    allowed = 3 * _allowed(bench) * max(size, float(found.attribution[:, real].abs().max()))
    own = (found.total().double() + found.bias)[real]
    _close("what wrote along a direction", own, found.logit.double()[real], allowed)
    _close(f"the stream at {at}", found.logit.double()[real], (stream @ v)[real], allowed)
    if unit != "component" or at != "final_post":
        return "right in sum"
    rows = dict(zip(found.labels, found.attribution.double(), strict=True))
    for label, x in truth.written.items():
        if label in rows and label.endswith("_out"):
            _close(f"row {label}", rows[label][real], (x @ v)[real], allowed)
    return "right"


def hold_sets(bench: Bench, truth: Truth) -> str:
    """A weighted set of tokens against the model's own logits, and against single tokens."""
    vocab = bench.root.config.vocab_size
    ids = bench.random.sample(range(vocab), 3)
    weights = [bench.random.choice([1, -1, 0.5, 100, -0.01]) for _ in ids]
    asked = dla_hooks.Tokens(dict(zip(ids, weights, strict=True)))
    given: dict[str, Any] = {"pos": None, "attention_mask": bench.mask}
    with bench.running():
        found = dla_hooks.direct_logit_attribution(bench.model, bench.ids, asked, **given)
    with bench.running():
        each = dla_hooks.direct_logit_attribution(
            bench.model, bench.ids, dla_hooks.Each([ids] * len(bench.ids)), pos=-1,
            attention_mask=bench.mask,
        )  # fmt: skip
    real, scale = _real(bench), sum(map(abs, weights))
    due = sum(w * truth.logits[..., i] for i, w in zip(ids, weights, strict=True))
    allowed = 3 * _allowed(bench) * scale * max(
        truth.size, float(each.attribution.nan_to_num().abs().max())
    )  # fmt: skip
    _close("a weighted set", found.logit.double()[real], due[real], allowed)
    own = (found.total().double() + found.bias)[real]
    _close("rows of a weighted set", own, found.logit.double()[real], allowed)
    last = found.position(-1) if bench.mask is None else None
    if last is not None and each.labels == found.labels:
        summed = (each.attribution.double() * torch.tensor(weights).double()).sum(-1)
        _close("a set and its tokens", last.attribution.double(), summed, allowed)
    return "right"


def hold_compare(bench: Bench, truth: Truth) -> str:
    """Two prompts compared, against the model's own logits on both."""
    if bench.mask is not None or bench.positional:
        return "right in sum"
    token, unit = bench.random.randrange(bench.root.config.vocab_size), bench.random.choice(UNITS)
    other = bench.ids.flip(1)
    with bench.running():
        found = dla_hooks.compare(
            bench.model, None, bench.ids, token, other_input=other, unit=unit, pos=None
        )
    if found.first.softcap is not None:
        return "right in sum"
    due = truth.logits[..., token] - plainly(bench, other, None).double()[..., token]
    size = max(truth.size, float(found.first.attribution.abs().max()))
    allowed = 3 * _allowed(bench) * max(size, float(found.second.attribution.abs().max()))
    _close("the difference of two runs", found.logit.double(), due, allowed)
    rows = found.attribution.double()
    whole = rows[-1] if unit == "layer" else rows.sum(0)
    _close("rows of a comparison", whole + found.bias, found.logit.double(), allowed)
    halves = found.written.double() + found.read.double()
    _close("written and read", halves, rows, allowed)
    return "right in sum"


def _real(bench: Bench) -> Tensor:
    if bench.mask is None:
        return torch.ones_like(bench.ids, dtype=torch.bool)
    return bench.mask.bool()
