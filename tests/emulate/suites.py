"""Runs another project's tests on the emulated driver, each file in a process of its own, and counts.

    python tests/emulate/suites.py FOLDER [--limit SECONDS] [pytest options]

FATHOM names the program (default: fathom). A file that fails as a whole is counted as one error; what
failed is listed with the first line of its reason. docs/emulator.md has what was found so.
"""
import collections
import os
import pathlib
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml

OUTCOMES = {"failure": "failed", "error": "failed", "skipped": "skipped"}


def outcome(case):
    """What became of a test case, and why."""
    for child in case:
        if child.tag in OUTCOMES:
            return OUTCOMES[child.tag], (child.get("message") or "").split("\n")[0]
    return "passed", ""


def run(file, limit, options):
    """Outcomes of a file's cases by name."""
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder, "report.xml")
        command = [os.environ.get("FATHOM", "fathom"), "emulate", "--", sys.executable, "-m", "pytest",
                   "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *options, str(file)]
        try:
            subprocess.run(command, timeout=limit, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            return {"(file)": ("failed", f"not over after {limit} seconds")}
        if not report.exists():
            return {"(file)": ("failed", "no report: the process died, or nothing could be collected")}
        cases = xml.parse(report).getroot().iter("testcase")
        return {f"{c.get('classname')}::{c.get('name')}": outcome(c) for c in cases}


def main(folder, *options):
    options, limit = list(options), 900
    if "--limit" in options:
        at = options.index("--limit")
        limit = int(options.pop(at + 1))
        options.pop(at)
    total = collections.Counter()
    for file in sorted(pathlib.Path(folder).rglob("test_*.py")):
        found = run(file, limit, options)
        counts = collections.Counter(what for what, _ in found.values())
        total += counts
        print(file.relative_to(folder), dict(counts), flush=True)
        for name, (what, why) in found.items():
            if what == "failed":
                print(f"    {name}: {why[:160]}", flush=True)
    print("all", dict(total))


if __name__ == "__main__":
    main(*sys.argv[1:])
