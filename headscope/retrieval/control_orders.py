"""Random orders of heads, to be masked beside those that score highest."""

from collections.abc import Sequence

from headscope.heads import HeadIndex

Order = tuple[HeadIndex, ...]


def matched(top: Sequence[HeadIndex], drawn: Order) -> Order:
    """A drawn order, rearranged so that its first n heads lie in the layers of the first n of top.

    Step by step the next drawn head of the layer whose turn it is; where that layer has none
    left, the next of any. So of every layer the first n hold at least as many as the first n of
    ``top``, or all that were drawn.

    Args:
        top: heads whose layers are to be matched, the first first.
        drawn: heads in a random order.

    Example:
        >>> from headscope.heads import HeadIndex as Head
        >>> top = (Head(2, 0), Head(0, 1), Head(2, 1))
        >>> order = matched(top, (Head(0, 0), Head(1, 0), Head(2, 3), Head(0, 2)))
        >>> [str(head) for head in order]
        ['L2H3', 'L0H0', 'L1H0', 'L0H2']
    """
    left = list(drawn)
    found = []
    for head in top:
        if not left:
            break
        at = next((i for i, one in enumerate(left) if one.layer == head.layer), 0)
        found.append(left.pop(at))
    return (*found, *left)
