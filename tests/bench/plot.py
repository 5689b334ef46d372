"""The growth plot, as SVG by hand: two panels, both axes logarithmic."""

from math import log10

WIDTH, HEIGHT, LEFT, TOP, GAP = 330, 240, 60, 70, 90
COLOURS = ["#0b6bcb", "#7c3aed", "#c2410c", "#6b7280"]
TITLES = {"readers": "readers, at 5 events/s", "events": "events/s, to 100 readers"}
STYLE = "font: 13px system-ui, sans-serif; background: white"


def draw(growth):
    """`growth` is {axis: {name: [(x, cpu_us, p50_ms), ...]}}."""
    ys = [cpu for lines in growth.values() for p in lines.values() for _, cpu, _ in p]
    low, high = 10 ** int(log10(min(ys)) - 0.01), 10 ** (int(log10(max(ys))) + 1)
    panels = [
        panel(LEFT + i * (WIDTH + GAP), TITLES[axis], lines, low, high)
        for i, (axis, lines) in enumerate(growth.items())
    ]
    names = next(iter(growth.values()))
    size = f'viewBox="0 0 {LEFT + 2 * (WIDTH + GAP)} {TOP + HEIGHT + 60}"'
    title = text(LEFT, 20, "CPU microseconds for one event to one reader", "start")
    body = "\n".join([title, *legend(names), *panels])
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} style="{STYLE}">'
    return f"{head}\n{body}\n</svg>\n"


def text(x, y, words, anchor="middle", colour="#111"):
    place = f'x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}"'
    return f'<text {place} fill="{colour}">{words}</text>'


def legend(names):
    for i, (name, colour) in enumerate(zip(names, COLOURS, strict=False)):
        yield text(LEFT + i * 170, 45, name, "start", colour)


def panel(left, title, lines, low, high):
    xs = [x for points in lines.values() for x, *_ in points]
    across, up = scale(min(xs), max(xs), WIDTH), scale(low, high, HEIGHT)
    bottom = TOP + HEIGHT
    parts = [text(left + WIDTH / 2, bottom + 45, title)]
    for y in decades(low, high):
        at = bottom - up(y)
        parts.append(f'<path d="M{left} {at:.1f}h{WIDTH}" stroke="#ddd"/>')
        parts.append(text(left - 8, at + 4, f"{y:,g}", "end"))
    parts += [text(left + across(x), bottom + 20, f"{x:,g}") for x in decades(min(xs), max(xs))]
    for points, colour in zip(lines.values(), COLOURS, strict=False):
        dots = [(left + across(x), bottom - up(cpu)) for x, cpu, _ in points]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in dots)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in dots]
    return "\n".join(parts)


def scale(low, high, length):
    span = log10(high / low) or 1
    return lambda value: log10(value / low) / span * length


def decades(low, high):
    value = low
    while value <= high:
        yield value
        value *= 10
