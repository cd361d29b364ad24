"""The figures of the concept pages: `python docs/_site/figures.py` writes them anew into docs/."""

from pathlib import Path

DOCS = Path(__file__).parent.parent
INK, SOFT, LINE = "#1f2937", "#6b7280", "#cbd5e1"
FROZEN, COLUMN, ROW, TRAINED, BALL = "#e5e7eb", "#7aa6da", "#e3a857", "#d1495b", "#e8f0fa"


def figure(name, width, height, title, *parts):
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" font-family="system-ui, sans-serif" font-size="15" fill="{INK}">\n'
        f"<title>{title}</title>\n"
        '<defs><marker id="arrow" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
        f'orient="auto"><path d="M0 0 10 5 0 10z" fill="{SOFT}"/></marker></defs>\n'
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>\n'
    )
    (DOCS / name).write_text(head + "\n".join(parts) + "\n</svg>\n", encoding="utf-8")


def box(x, y, width, height, fill, stroke="none", radius=0):
    return f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="{radius}" fill="{fill}" stroke="{stroke}"/>'


def text(x, y, said, size=15, fill=INK, anchor="middle", weight="normal"):
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" fill="{fill}" text-anchor="{anchor}" font-weight="{weight}">'
        f"{said}</text>"
    )


def arrow(*points, dashed=False):
    path = " ".join(f"{x},{y}" for x, y in points)
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<polyline points="{path}" fill="none" stroke="{SOFT}" stroke-width="1.6"{dash} marker-end="url(#arrow)"/>'


def cur():
    """W with the drawn columns and rows; beside it the product of C, U and R."""
    columns, rows, side = (20, 66, 112), (24, 66, 118), 11
    x, y, width, height = 16, 52, 150, 150
    parts = [text(x + width / 2, 34, "W, frozen", weight="600"), box(x, y, width, height, FROZEN)]
    parts += [box(x + at, y, side, height, COLUMN) for at in columns]
    parts += [f'<g opacity="0.85">{box(x, y + at, width, side, ROW)}</g>' for at in rows]
    parts += [text(x + width / 2, 226, "m × n", 15, SOFT), text(196, 134, "+ α", 22)]
    left = 228
    for number in range(3):
        parts.append(box(left + number * 14, y, side, height, COLUMN))
        parts.append(box(392, y + 55 + number * 14, width, side, ROW))
    parts += [text(left + 20, 34, "C", weight="600"), text(left + 20, 226, "columns of W", 15, SOFT)]
    parts += [box(306, 106, 42, 42, TRAINED, radius=2), text(327, 133, "U", 18, "#ffffff", weight="600")]
    parts += [text(327, 93, "r × r", weight="600"), text(327, 172, "trained", 15, SOFT)]
    parts += [text(467, 93, "R", weight="600"), text(467, 172, "rows of W", 15, SOFT)]
    figure("cur.svg", 558, 242, "A weight W, its columns C and rows R, and the small trained U between them", *parts)


def ball():
    """Steps from the calibrated model, one that would leave the ball, and the measured scale-back at the end."""
    x, y, radius = 210, 172, 150
    parts = [
        f'<circle cx="{x}" cy="{y}" r="{radius}" fill="{BALL}" stroke="{COLUMN}" stroke-width="2"/>',
        f'<circle cx="{x}" cy="{y}" r="6" fill="{INK}"/>',
        text(x, y + 28, "the calibrated model", 15, SOFT),
        arrow((210, 166), (238, 128)), arrow((238, 128), (226, 86)), arrow((226, 86), (276, 72)),
        arrow((276, 72), (362, 28), dashed=True), arrow((362, 28), (323, 65)),
        f'<circle cx="319" cy="69" r="6" fill="{TRAINED}"/>',
        arrow((315, 73), (283, 104)),
        '<circle cx="279" cy="108" r="6" fill="#2f855a"/>',
        text(384, 34, "1", 18, weight="600"), text(340, 88, "2", 18, TRAINED, weight="600"),
        text(296, 126, "3", 18, "#2f855a", weight="600"),
        text(x, 346, "distance² = predicted KL divergence", 15, SOFT),
        text(x, 368, "radius² = budget: log 1.01 nats for 1 %", 15, SOFT),
    ]  # fmt: skip
    figure("ball.svg", 420, 384, "Training within a ball around the calibrated model", *parts)


def flow():
    """A budgeted training from its text to its ledger."""
    stages = [
        ("Text", "yours, or what", "the model writes"),
        ("Columns, rows", "chosen for the task", "from 128 examples"),
        ("Calibration", "one pass: what the", "text uses of a layer"),
        ("Training", "a prediction and", "a limit at every step"),
        ("Measurement", "perplexity of each", "text; scale back"),
        ("Ledger", "saved with", "the adapter"),
    ]
    width, gap, top = 140, 30, 34
    parts = []
    for number, (name, first, second) in enumerate(stages):
        row, place = divmod(number, 3)
        x, y = 20 + place * (width + gap), top + row * 130
        fill = TRAINED if name == "Training" else BALL
        ink = "#ffffff" if name == "Training" else INK
        parts.append(box(x, y, width, 82, fill, "none" if name == "Training" else COLUMN, 8))
        parts += [text(x + width / 2, y + 28, name, 15, ink, weight="600")]
        parts += [text(x + width / 2, y + 49, first, 13, ink), text(x + width / 2, y + 66, second, 13, ink)]
        if place < 2:
            parts.append(arrow((x + width + 3, y + 41), (x + width + gap - 3, y + 41)))
    last, first_of_second = 20 + 2 * (width + gap) + width / 2, 20 + width / 2
    parts.append(arrow((last, top + 85), (last, top + 106), (first_of_second, top + 106), (first_of_second, top + 127)))
    parts.append(arrow((last, top + 130 + 85), (last, 280), (first_of_second - 50, 280), (first_of_second - 50, 249),
                       dashed=True))  # fmt: skip
    below = "next month: same calibration, earlier tasks held, what is left of the budget"
    parts.append(text(last - 170, 298, below, 13, SOFT))
    figure("flow.svg", 520, 310, "The course of a training under a budget", *parts)


if __name__ == "__main__":
    cur()
    ball()
    flow()
