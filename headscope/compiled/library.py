"""A library of head programs, from a single copying head to an indirect-object circuit."""

from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise

from headscope.base.arguments import checked
from headscope.compiled.program import (
    Feature,
    Head,
    Lookup,
    Program,
    always,
    offset,
    same,
    table,
)


def copy_program(tokens: int = 5, length: int = 8) -> Program:
    """Output each position's own token, copied by a head that attends to itself."""
    head = Head(0, "position", "position", offset(0), "token", "answer", role="current_token")
    return Program("copy", tokens, length, (head,), ("answer",))


def previous_program(tokens: int = 5, length: int = 8) -> Program:
    """Output the previous token at each position."""
    return Program("previous", tokens, length, (_previous("answer"),), ("answer",))


def two_back_program(tokens: int = 5, length: int = 8) -> Program:
    """Output the token two positions back: one head moves what an earlier head moved."""
    second = Head(1, "position", "position", offset(1), "previous", "answer", role="previous_token")
    return Program("two back", tokens, length, (_previous("previous"), second), ("answer",))


def reverse_program(tokens: int = 5, length: int = 9) -> Program:
    """Output the first half's tokens in reverse order in the second half."""
    half = (length + 1) // 2
    mirror = table("mirror", {i: [length - 1 - i] for i in range(half, length)})
    head = Head(0, "position", "position", mirror, "token", "answer")
    return Program("reverse", tokens, length, (head,), ("answer",))


def duplicate_program(tokens: int = 5, length: int = 8) -> Program:
    """Output the token if it occurred before, else the BOS."""
    head = Head(
        0, "token", "token", same(), "token", "answer", ties="last", others_only=True,
        role="duplicate_token",
    )  # fmt: skip
    return Program("duplicate", tokens, length, (head,), ("answer",))


@checked
def induction_program(tokens: int = 8, length: int = 16) -> Program:
    """Output what followed earlier occurrences of the token (Elhage et al. 2021).

    Args:
        tokens: number of token ids, including the BOS.
        length: length of the longest text, in tokens.

    Example:
        >>> [head.role for head in hs.compiled.induction_program().heads]
        ['previous_token', 'induction']
    """
    heads = (_previous("previous"), _induction("answer"))
    return Program("induction", tokens, length, heads, ("answer",))


def redundant_induction_program(tokens: int = 8, length: int = 16) -> Program:
    """Induction by two redundant heads, so that neither alone is needed."""
    heads = (_previous("previous"), _induction("first"), _induction("second"))
    return Program(
        "redundant induction", tokens, length, heads, ("first", "second"),
        redundant=frozenset({"first", "second"}),
    )  # fmt: skip


def recall_program(pairs: int = 3, length: int = 10) -> Program:
    """Associative recall by an induction pair: after key-value pairs, output a key's value."""
    tokens = 1 + 2 * pairs
    kind = Feature("kind", (0, *[1] * pairs, *[2] * pairs), size=3)
    heads = (_previous("previous"), _induction("answer"))
    return Program("recall", tokens, length, heads, ("answer",), features=(kind,))


@checked
def pointer_program(tokens: int = 6, length: int = 8) -> Program:
    """Induction by a pointer: find the earlier occurrence, take its position, read the next.

    Args:
        tokens: number of token ids, including the BOS.
        length: length of the longest text, in tokens.

    Example:
        >>> [head.role for head in hs.compiled.pointer_program().heads]
        ['duplicate_token', 'pointer']
    """
    after = table("next", {i: [i + 1] for i in range(length - 1)})
    heads = (
        Head(0, "token", "token", same(), "position", "place", ties="last", others_only=True,
             role="duplicate_token"),
        Head(1, "place", "position", after, "token", "answer", role="pointer"),
    )  # fmt: skip
    return Program("pointer", tokens, length, heads, ("answer",))


def trigram_program(tokens: int = 4, length: int = 8) -> Program:
    """Output a table lookup on the last two tokens, by an MLP fed by a head."""
    lookup = Lookup(
        0, ("previous", "token"), "answer", tokens, lambda before, now: (before + 2 * now) % tokens
    )
    return Program("trigram", tokens, length, (_previous("previous"),), ("answer",), (lookup,))


def successor_program(tokens: int = 6, length: int = 8) -> Program:
    """Output the successor of each token in order, computed by a head's weights."""
    successors = Feature("successor", tuple((n + 1) % tokens for n in range(tokens)), size=tokens)
    head = Head(0, "token", "token", same(), "successor", "answer", role="successor")
    return Program("successor", tokens, length, (head,), ("answer",), features=(successors,))


def histogram_program(tokens: int = 6, length: int = 6) -> Program:
    """Output how often each token has occurred so far.

    The head attends equally to all occurrences and the BOS, so the BOS gets ``1 / (1 + count)``,
    from which the MLP computes the count (RASP's selector width).
    """
    counts = [1 / (1 + n) for n in range(1, tokens)]
    cuts = tuple(sorted((a + b) / 2 for a, b in pairwise(counts)))
    widths = table("same or BOS", {n: sorted({0, n}) for n in range(tokens)})
    head = Head(0, "token", "token", widths, "is_bos", "width")
    lookup = Lookup(0, ("width",), "answer", tokens, lambda n: tokens - 1 - n, cuts)
    first = Feature("is_bos", (1.0, *[0.0] * (tokens - 1)))
    return Program("histogram", tokens, length, (head,), ("answer",), (lookup,), (first,))


def most_frequent_program(tokens: int = 6, length: int = 6) -> Program:
    """Output the most frequent token so far; ties are averaged."""
    counting = histogram_program(tokens, length)
    lookup = counting.lookups[0]
    counted = Lookup(0, lookup.inputs, "count", tokens, lookup.maps, lookup.cuts)
    most = Head(1, "one", "count", always(), "token", "answer", ties="largest")
    return Program(
        "most frequent", tokens, length, (*counting.heads, most), ("answer",), (counted,),
        counting.features,
    )  # fmt: skip


def largest_program(tokens: int = 6, length: int = 8) -> Program:
    """Output the largest token so far, the last step of a sort."""
    head = Head(0, "one", "token", always(), "token", "answer", ties="largest")
    return Program("largest", tokens, length, (head,), ("answer",))


def sort_program(tokens: int = 8, length: int = 10) -> Program:
    """Output the largest token so far that is smaller than the current one.

    With the largest id as the separator, ``BOS 3 5 1 SEP`` continues with ``5 3 1 BOS``: each
    answer is the query for the next. It sorts sets: duplicates are output once.

    Example:
        >>> made = hs.compiled.from_library("sort")
        >>> text = [0, 3, 5, 1, 7]
        >>> for _ in range(3):
        ...     text.append(int(made.module(torch.tensor([text])).logits[0, -1].argmax()))
        >>> text[5:]
        [5, 3, 1]
    """
    smaller = table("smaller", {n: range(1, n) for n in range(tokens)})
    head = Head(0, "token", "token", smaller, "token", "answer", ties="largest", role="sort")
    return Program("sort", tokens, length, (head,), ("answer",))


def dyck_program(length: int = 8) -> Program:
    """Dyck-1 with brackets 1 and 2: output 1 if more open, 2 if more closed, 0 if balanced."""
    opened = Feature("opened", (0.5, 1.0, 0.0))
    head = Head(0, "one", "one", always(), "opened", "share")
    margin = 0.2 / length
    lookup = Lookup(
        0, ("share",), "answer", 3, lambda n: (2, 0, 1)[n], (0.5 - margin, 0.5 + margin)
    )
    return Program("dyck", 3, length, (head,), ("answer",), (lookup,), (opened,))


def two_bracket_program(length: int = 8) -> Program:
    """Dyck-2 with brackets 1 2 and 3 4: output 0 if balanced, 1 if open, 2 if broken.

    Two heads count opening and closing brackets, and MLPs compute the depth. A closing bracket then
    attends to the last opening bracket at its level, an MLP compares their kinds, and a last head
    carries errors to all later positions.

    Example:
        >>> made = hs.compiled.from_library("dyck 2")
        >>> text = torch.tensor([[0, 1, 3, 4, 2, 1, 4]])  # ( [ ] ) ( ]
        >>> made.module(text).logits.argmax(-1).tolist()
        [[0, 1, 1, 1, 0, 1, 2]]
    """
    deepest, none = length - 1, length
    is_bos = Feature("is_bos", (1.0, 0.0, 0.0, 0.0, 0.0))
    closing = Feature("closing", (0, 0, 1, 0, 1), size=2)
    cuts = tuple(sorted((1 / (1 + n) + 1 / (2 + n)) / 2 for n in range(deepest)))
    openers, closers = (
        table("opening or BOS", {0: [0, 1, 3]}),
        table("closing or BOS", {0: [0, 2, 4]}),
    )

    def level(opened: int, closed: int, closes: int, *, of: int) -> int:
        depth = opened - closed + closes
        return depth if closes == of and 0 < depth <= deepest else (0 if of else none)

    heads = (
        Head(0, "one", "token", openers, "is_bos", "share_opened"),
        Head(0, "one", "token", closers, "is_bos", "share_closed"),
        Head(2, "closed_level", "opened_level", same(), "token", "partner", ties="last",
             role="bracket_matching"),
        Head(3, "one", "mistake", table("mistaken", {0: [1]}), "mistake", "broken", ties="last"),
    )  # fmt: skip
    counted = ("opened", "closed", "closing")
    lookups = (
        Lookup(0, ("share_opened",), "opened", length, lambda n: deepest - n, cuts),
        Lookup(0, ("share_closed",), "closed", length, lambda n: deepest - n, cuts),
        Lookup(1, counted, "opened_level", length + 1, partial(level, of=0)),
        Lookup(1, counted, "closed_level", length + 1, partial(level, of=1)),
        Lookup(2, ("token", "partner"), "mistake", 2,
               lambda now, partner: int(now in (2, 4) and partner != now - 1)),
        Lookup(3, ("opened", "closed", "broken"), "answer", 5,
               lambda opened, closed, broken: 2 if broken else int(opened > closed)),
    )  # fmt: skip
    return Program("dyck 2", 5, length, heads, ("answer",), lookups, (is_bos, closing))


def mean_program(length: int = 8) -> Program:
    """Output the running mean of the numbers that tokens represent, rounded.

    Token ``n`` represents ``(n - 1) / 3``, and the BOS 0: the simplest in-context estimate.
    """
    number = Feature("number", (0.0, 0.0, 1 / 3, 2 / 3, 1.0))
    head = Head(0, "one", "one", always(), "number", "mean")
    cuts = (0.118, 0.354, 0.646, 0.882)  # midpoints between the possible means of 8 such numbers
    lookup = Lookup(0, ("mean",), "answer", 5, lambda n: n, cuts)
    return Program("mean", 5, length, (head,), ("answer",), (lookup,), (number,))


def regression_program(length: int = 8) -> Program:
    """In-context regression: after pairs ``x y``, output the mean ``y`` for an ``x`` so far.

    Tokens 1 and 2 are the two values of x; token ``n`` from 3 on represents ``(n - 3) / 3``. An
    induction head averages the numbers after earlier occurrences of the current token (the
    least-squares fit of y on a categorical x), and the MLP rounds the mean.

    Example:
        >>> made = hs.compiled.from_library("regression")
        >>> text = torch.tensor([[0, 1, 3, 1, 5, 2, 6, 1]])  # behind 1: 0 and 2/3
        >>> int(made.module(text).logits[0, -1].argmax())  # 1/3
        4
    """
    number = Feature("number", (0.0, 0.0, 0.0, 0.0, 1 / 3, 2 / 3, 1.0))
    cuts = (0.155, 0.488, 0.845)  # midpoints between the possible means of up to 7 such numbers
    heads = (
        _previous("previous"),
        Head(1, "token", "previous", same(), "number", "mean", role="induction"),
    )
    lookup = Lookup(1, ("mean",), "answer", 7, lambda n: 3 + n, cuts)
    return Program("regression", 7, length, heads, ("answer",), (lookup,), (number,))


def name_mover_program(names: int = 4, length: int = 8) -> Program:
    """Output all names so far; tokens 1 to ``names`` are names."""
    tokens = names + 3
    listed = table("names", {0: range(1, names + 1)})
    head = Head(0, "one", "token", listed, "token", "answer", role="name_mover")
    return Program("name mover", tokens, length, (head,), ("answer",))


@checked
def ioi_program(names: int = 4, length: int = 8) -> Program:
    """Indirect object identification: output the name that is not repeated (Wang et al. 2023).

    A duplicate-token head marks the repeated name, an inhibition head moves it to all later
    positions, and a name mover attends to the other names.

    Args:
        names: number of names.
        length: length of the longest text, in tokens.

    Example:
        >>> hs.compiled.ioi_program(names=3).tokens
        6
    """
    tokens = names + 3
    people = range(1, names + 1)
    repeated = table("repeated", {0: people})
    others = table("others", {n: [m for m in people if m != n] for n in people})
    heads = (
        Head(0, "token", "token", same(), "token", "seen", ties="last", others_only=True,
             role="duplicate_token"),
        Head(1, "one", "seen", repeated, "token", "subject", ties="last", role="s_inhibition"),
        Head(2, "subject", "token", others, "token", "answer", role="name_mover"),
    )  # fmt: skip
    return Program("indirect object", tokens, length, heads, ("answer",))


def retrieval_program(tokens: int = 8, length: int = 16) -> Program:
    """Retrieval: output the token after the latest marker (token 1)."""
    announced = table("after the marker", {0: [1]})
    heads = (
        _previous("previous"),
        Head(1, "one", "previous", announced, "token", "answer", ties="last", role="retrieval"),
    )
    return Program("planted retrieval", tokens, length, heads, ("answer",))


def greater_than_program(numbers: int = 6, length: int = 10) -> Program:
    """Output all numbers so far that are greater than the one after the marker (token 1).

    Tokens from 2 on are numbers. One head retrieves the marked number, and another attends to all
    greater ones (Hanna et al. 2023, who study years).
    """
    tokens = 2 + numbers
    announced = table("after the marker", {0: [1]})
    greater = table("greater", {n: list(range(n + 1, tokens)) for n in range(2, tokens)})
    heads = (
        _previous("previous"),
        Head(1, "one", "previous", announced, "token", "start", ties="last", role="retrieval"),
        Head(2, "start", "token", greater, "token", "answer", role="greater_than"),
    )
    return Program("greater than", tokens, length, heads, ("answer",))


def bystander_program(tokens: int = 8, length: int = 16) -> Program:
    """Induction next to a duplicate-token head and a copying head whose outputs are not read."""
    heads = (
        _previous("previous"),
        Head(0, "token", "token", same(), "token", "seen", ties="last", others_only=True,
             role="duplicate_token"),
        _induction("answer"),
        Head(1, "position", "position", offset(0), "token", "copied", role="current_token"),
    )  # fmt: skip
    return Program("bystanders", tokens, length, heads, ("answer",))


def _previous(output: str) -> Head:
    return Head(0, "position", "position", offset(1), "token", output, role="previous_token")


def _induction(output: str) -> Head:
    return Head(1, "token", "previous", same(), "token", output, role="induction")


LIBRARY: Mapping[str, Callable[[], Program]] = {
    program().name: program
    for program in (
        copy_program,
        previous_program,
        two_back_program,
        reverse_program,
        duplicate_program,
        induction_program,
        redundant_induction_program,
        recall_program,
        pointer_program,
        trigram_program,
        successor_program,
        histogram_program,
        most_frequent_program,
        largest_program,
        sort_program,
        dyck_program,
        two_bracket_program,
        mean_program,
        regression_program,
        name_mover_program,
        ioi_program,
        retrieval_program,
        greater_than_program,
        bystander_program,
    )
}
