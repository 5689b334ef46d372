"""Makes the README's picture: the clock view after a cut of 5 s, and beside it the chat
under a cut.

    python tests/pages/picture.py [FILE]
"""

import base64
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from kit import Server, launched, wait_until  # noqa: E402 (found only now)

SIZE = {"width": 680, "height": 890}
SIDE_BY_SIDE = """<body style="display: flex; gap: 2px; margin: 0; background: #dcded6">
<img src="{}" width="680"><img src="{}" width="680">"""


def clock_after_a_cut(page, server):
    page.goto(f"{server.http}/?lang=en#clock")
    time.sleep(14)
    page.locator("#clock-cut button").first.click()
    time.sleep(5 + 8)
    page.locator("#clock-title").scroll_into_view_if_needed()
    return page.screenshot()


def chat_under_a_cut(page, server):
    page.goto(f"{server.http}/?lang=en#chat")
    page.locator("#examples button").first.click()
    written = page.locator("#log .answer > .text")
    wait_until(lambda: len(written.text_content()) > 600)
    page.locator("#cut-chat button").nth(1).click()
    time.sleep(3)
    return page.screenshot()


def beside_each_other(context, *pictures):
    page = context.new_page()
    page.set_viewport_size({"width": 2 * SIZE["width"] + 2, "height": SIZE["height"]})
    urls = [f"data:image/png;base64,{base64.b64encode(p).decode()}" for p in pictures]
    page.set_content(SIDE_BY_SIDE.format(*urls))
    return page.screenshot()


def main(file):
    with tempfile.TemporaryDirectory() as folder, launched() as browser:
        server = Server(Path(folder))
        try:
            context = browser.new_context(viewport=SIZE, device_scale_factor=1.5)
            clock = clock_after_a_cut(context.new_page(), server)
            chat = chat_under_a_cut(context.new_page(), server)
            file.write_bytes(beside_each_other(context, clock, chat))
        finally:
            server.stop()


if __name__ == "__main__":
    here = Path(__file__).parent
    main(Path(sys.argv[1]) if sys.argv[1:] else here / "screenshot.png")
