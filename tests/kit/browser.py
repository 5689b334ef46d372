"""A real Chromium, driven by Playwright; for tests that are not async."""

from contextlib import contextmanager

from .common import need, need_module

CHROMIUM_FLAGS = [
    "--no-sandbox",  # Chromium refuses to run as root with it, as in most containers
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@contextmanager
def launched(*flags):
    """A browser, closed at the end."""
    path = need("chromium chromium-browser google-chrome", "apt-get install chromium")
    api = need_module("playwright.sync_api", "pip install playwright")
    with api.sync_playwright() as playwright:
        arguments = [*CHROMIUM_FLAGS, *flags]
        browser = playwright.chromium.launch(executable_path=path, args=arguments)
        yield browser
        browser.close()
