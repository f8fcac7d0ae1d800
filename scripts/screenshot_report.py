"""Screenshots of a page of lowbit's in a real browser: a desktop, a phone, and dark mode.

    python scripts/screenshot_report.py my-model-w4/report.html --output docs/images/report

writes `report-desktop.png`, `report-phone.png` and `report-dark.png`. It needs Chromium (Debian: apt install
chromium) and, to make the files small, Pillow.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

COLOURS = 128
VIEWS = {"desktop": (1100, False), "phone": (390, False), "dark": (1100, True)}


def shoot(browser: str, page: Path, image: Path, width: int, height: int, dark: bool) -> None:
    """One screenshot; a frame gives the page its width, as headless windows are never below 500."""
    with tempfile.TemporaryDirectory() as scratch:
        frame = Path(scratch) / "frame.html"
        frame.write_text(
            f'<!doctype html><body style="margin:0"><iframe src="{page.resolve().as_uri()}" '
            f'style="border:0;display:block" width="{width}" height="{height}" scrolling="no"></iframe>'
        )
        command = [
            browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--allow-file-access-from-files", f"--user-data-dir={scratch}/profile",
            f"--window-size={max(width, 500)},{height}", f"--screenshot={image.resolve()}",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}", frame.as_uri(),
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, timeout=120)


def shrink(image: Path, width: int) -> None:
    """Cut the window to the page's width, and the colours to a palette."""
    from PIL import Image

    with Image.open(image) as opened:
        small = opened.crop((0, 0, width, opened.height)).convert("RGB").quantize(COLOURS)
    small.save(image, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("page", type=Path, help="report.html or compare.html")
    parser.add_argument("--output", type=Path, default=Path("report"), help="beginning of the images' names")
    parser.add_argument("--height", type=int, default=1800, help="pixels from the top")
    parser.add_argument("--views", nargs="*", choices=VIEWS, default=list(VIEWS))
    options = parser.parse_args()
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        sys.exit("Chromium is not installed: apt install chromium")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for view in options.views:
        width, dark = VIEWS[view]
        image = options.output.with_name(f"{options.output.name}-{view}.png")
        shoot(browser, options.page, image, width, options.height, dark)
        shrink(image, width)
        print(f"{image}: {image.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
