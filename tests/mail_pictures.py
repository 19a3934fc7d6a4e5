"""Takes the pictures of our mail in docs/, with the Chromium on PATH: `.venv/bin/python tests/mail_pictures.py`."""

import os
import shutil
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Final

from service.mail import Templates

DOCS: Final = Path(__file__).parent.parent / "docs"
WINDOWS: Final = {"desktop": ("720,472", "1"), "phone": ("390,432", "2")}
"""Width and height, and pixels for each of theirs."""
SCHEMES: Final = {"dark": "0", "light": "1"}
"""As Chromium counts them."""


def main() -> None:
    """Take a picture for each kind of window and each colour scheme."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("there is no chromium on PATH: Debian's package chromium is right")
    content = Templates(None, locale="en").write(
        code="481902", locale="en", product="Example", lifetime=timedelta(minutes=15)
    )
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "mail.html")
        page.write_text(content.html, "utf-8")
        for window, (size, scale) in WINDOWS.items():
            for scheme, number in SCHEMES.items():
                picture = DOCS / f"mail-{scheme}-{window}.png"
                arguments = [
                    "--headless",
                    "--hide-scrollbars",
                    f"--user-data-dir={folder}/profile",
                    f"--window-size={size}",
                    f"--force-device-scale-factor={scale}",
                    f"--blink-settings=preferredColorScheme={number}",
                    f"--screenshot={picture}",
                    *(["--no-sandbox"] if os.geteuid() == 0 else []),  # for root there is none
                    page.as_uri(),
                ]
                subprocess.run([chromium, *arguments], check=True, capture_output=True, timeout=60)
                print(f"{picture.name}: {picture.stat().st_size} bytes")  # noqa: T201 - what this script says


if __name__ == "__main__":
    main()
