"""The tree, coloured by accuracy, as parts that open; mistakes and examples beside it."""

from itertools import chain

from timm_branches.train.report.answers import Answers
from timm_branches.train.report.html import data_uri, details, fold, png_of, table, text

__all__ = ["confusion_table", "example_cards", "tree_outline"]

Node = tuple[str, ...]
MOST_ROWS = 3000  # of the tree: a page of half a megabyte
OPEN_ROWS = 60  # a tree of fewer rows is shown open
# from vermilion through yellow to blue, told apart with every kind of colour vision
_SCALE = ["#d55e00", "#e08a2e", "#e9b04b", "#d9c97a", "#8fb8b0", "#56a0c9", "#0072b2"]


def tree_outline(answers: Answers) -> str:
    """Every node with its accuracy; a node opens to show its children, the worst first.

    Of a tree with more nodes than a page should hold, only the worst children of each node are
    shown, and how many others there are.
    """
    counts = answers.node_counts()
    children = _children(answers)
    limit = _most_children(children)
    lines = _rows(children[()], children, counts, limit, opened=len(counts) <= OPEN_ROWS)
    legend = "".join(
        f'<span class="bar"><i style="background:{colour};width:100%"></i></span>'
        for colour in _SCALE
    )
    note = f"Accuracy of each class on its level, {text(answers.decoder)}. The worst stand first."
    return (
        f'<p class="note">{note}</p>\n<p class="note legend">0 % {legend} 100 %</p>\n'
        f'<div class="tree">{lines}</div>'
    )


def _children(answers: Answers) -> dict[Node, list[Node]]:
    children: dict[Node, list[Node]] = {(): list(answers.taxonomy.nodes[0])}
    for node in chain.from_iterable(answers.taxonomy.nodes):
        children.setdefault(node, [])
        if len(node) > 1:
            children[node[:-1]].append(node)
    return children


def _most_children(children: dict[Node, list[Node]]) -> int:
    """The largest number of children that keeps the page small."""
    widest = max(map(len, children.values()))
    for limit in (widest, 300, 100, 50, 30, 20, 10, 5, 3, 2):
        # the first ones stand for the worst: which they are hardly changes the number
        rows = 0
        waiting = list(children[()][:limit])
        while waiting and rows <= MOST_ROWS:
            rows += 1
            waiting += children[waiting.pop()][:limit]
        if rows <= MOST_ROWS:
            return limit
    return 1


def _rows(
    nodes: list[Node],
    children: dict[Node, list[Node]],
    counts: dict[Node, tuple[int, int]],
    limit: int,
    opened: bool,
) -> str:
    def worst_first(node: Node) -> tuple[bool, float]:
        total, right = counts[node]
        return total == 0, right / max(1, total)

    ordered = sorted(nodes, key=worst_first)
    lines = []
    for node in ordered[:limit]:
        summary = _node(node[-1], *counts[node])
        if children[node]:
            inner = _rows(children[node], children, counts, limit, opened)
            lines.append(fold(summary, inner, opened))
        else:
            lines.append(f'<div class="leaf">{summary}</div>')
    rest = ordered[limit:]
    if rest:
        total = sum(counts[node][0] for node in rest)
        right = sum(counts[node][1] for node in rest)
        summary = _node(f"{len(rest)} others", total, right)
        lines.append(f'<div class="leaf">{summary}</div>')
    return "\n".join(lines)


def _node(name: str, total: int, right: int) -> str:
    """A bar as long as the accuracy, and in its colour; the name; the numbers."""
    if not total:
        return f'<span class="bar"></span>{text(name)} <span class="value">no sample</span>'
    share = right / total
    colour = _SCALE[min(len(_SCALE) - 1, int(share * len(_SCALE)))]
    percent = f"{100 * share:.1f} %"
    return (
        f'<span class="bar"><i style="background:{colour};width:{100 * share:.0f}%"></i></span>'
        f'{text(name)} <span class="value">{percent} of {total}</span>'
    )


def confusion_table(answers: Answers) -> str:
    """The mistakes that cost most: tree distance times count."""
    rows: list[tuple] = [("true", "answered", "count", "distance", "cost")]
    for truth, answer, count, distance in answers.confusions():
        rows.append((truth, answer, count, distance, count * distance))
    if len(rows) == 1:
        return "<p>There is no mistake.</p>"
    note = '<p class="note">The cost is the count times the distance in the tree, in levels.</p>'
    return note + table(rows, words=True)


def example_cards(answers: Answers, count: int = 12) -> list[str]:
    """The worst mistakes and the surest right answers, with small pictures."""
    best, worst = answers.extremes(count)
    parts = []
    for title, rows, opened in (
        ("Worst: the farthest off in the tree, and the surest of it", worst, True),
        ("Best: right, and the surest of it", best, False),
    ):
        if rows:
            cards = "\n".join(_card(answers, row) for row in rows)
            parts.append(details(title, f'<div class="cards">{cards}</div>', opened))
    return parts


def _card(answers: Answers, row: int) -> str:
    truth = answers.path(answers.labels[row].tolist())
    answer = answers.path(answers.predictions[row].tolist())
    picture, few_pixels = png_of(answers.pixels(row))
    kind = ' class="pixels"' if few_pixels else ""
    percent = f"{100 * float(answers.confidences[row]):.0f} %"
    name = answers.name(row)
    return (
        f'<div class="card"><img{kind} alt="{text(name)}" src="{data_uri(picture)}">'
        f"<div>true: <b>{text(truth, 120)}</b></div>"
        f"<div>answered: <b>{text(answer, 120)}</b> {percent}</div>"
        f'<div class="value">{text(name, 80)}</div></div>'
    )
