"""Runs another project's tests on the emulated driver, each file in a process of its own, and counts.

    python tests/emulate/suites.py FOLDER|FILE [--limit SECONDS] [--each N] [pytest options]

FATHOM names the program (default: fathom). A file that fails as a whole is counted as one error; what
failed is listed with the first line of its reason. With --each only N parametrisations of each test are
run, evenly spaced. docs/emulator.md has what was found so.
"""
import collections
import os
import pathlib
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml

OUTCOMES = {"failure": "failed", "error": "failed", "skipped": "skipped"}


def pytest_collection_modifyitems(config, items):
    """Of each test N parametrisations: this file is a plugin of the pytest that it starts."""
    each, tests = int(os.environ.get("FATHOM_SUITE_EACH", 0)), collections.defaultdict(list)
    if each == 0:
        return
    for item in items:
        tests[item.nodeid.split("[")[0]].append(item)
    kept = [t[i * len(t) // each] for t in tests.values() for i in range(each) if each < len(t)]
    kept += [item for t in tests.values() for item in t if each >= len(t)]
    items[:] = [item for item in items if item in kept]


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


def taken(options, name, default):
    """The number that follows a name, both taken out of the options."""
    if name not in options:
        return default
    at = options.index(name)
    number = int(options.pop(at + 1))
    options.pop(at)
    return number


def main(folder, *options):
    folder, options = pathlib.Path(folder), list(options)
    limit, each = taken(options, "--limit", 900), taken(options, "--each", 0)
    if each:
        own = str(pathlib.Path(__file__).parent.resolve())
        os.environ["PYTHONPATH"] = os.pathsep.join([own, *filter(None, [os.environ.get("PYTHONPATH")])])
        os.environ["FATHOM_SUITE_EACH"] = str(each)
        options += ["-p", "suites"]
    total = collections.Counter()
    for file in sorted(folder.rglob("test_*.py")) if folder.is_dir() else [folder]:
        found = run(file, limit, options)
        counts = collections.Counter(what for what, _ in found.values())
        total += counts
        print(file, dict(counts), flush=True)
        for name, (what, why) in found.items():
            if what == "failed":
                print(f"    {name}: {why[:160]}", flush=True)
    print("all", dict(total))


if __name__ == "__main__":
    main(*sys.argv[1:])
