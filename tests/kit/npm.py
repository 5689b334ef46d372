"""npm packages that the tests drive, kept from one run to the next."""

import hashlib
import os
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

from .common import need


def npm_packages(*names):
    """A folder with `node_modules` in it, with all of these installed."""
    npm = need("npm", "apt-get install nodejs npm")
    need("node", "apt-get install nodejs")
    names = sorted(names)
    key = hashlib.sha256(" ".join(names).encode()).hexdigest()[:12]
    cache = Path(tempfile.gettempdir()) / f"chatstream-test-npm-{os.getuid()}-{key}"
    if not cache.exists():
        install = [npm, "install", "--no-audit", "--no-fund", "--silent", *names]
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(install, cwd=folder, check=True, timeout=300)
            with suppress(OSError):  # another run has been faster
                Path(folder).rename(cache)  # appears whole, for runs that look for it
    return cache
