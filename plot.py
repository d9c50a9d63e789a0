"""Draw the curves of runs over their seeds: python3 plot.py ./logdir/crafter --out crafter.png

Takes the logdirs of runs, or folders of them. Runs that differ only in their seed become one curve: the
interquartile mean with its 95 % bootstrap interval as a shade. Panels of success rates, exploration and
advice follow if the runs have them. --html writes a page with the videos, too. Needs matplotlib (pip install
-r requirements/plot.txt). The suffix of --out selects PNG, SVG or PDF.
"""

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path

from basics import UserError
from reports import figures, page
from reports.logs import Group, group_runs, printable, read_runs


def check_metrics(names: Sequence[str], groups: Sequence[Group]) -> None:
    """Raises UserError for a metric that no run has logged."""
    known = {name for group in groups for run in group.runs for line in run.lines for name in line}
    known.discard("step")
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), 1, cutoff=0)
            nearest = f"the nearest is {printable(near[0])}" if near else "nothing is logged yet"
            raise UserError(f"--metrics {name}: no run has logged it; {nearest}")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("logdirs", nargs="+", type=Path, metavar="LOGDIR", help="a run, or a folder of runs")
    add("--out", type=Path, help="the figure; default: curves.png, or none with --html")
    add("--html", type=Path, metavar="PAGE", help="a page of figures, tables and videos in one file")
    add("--metrics", nargs="+", default=[], metavar="NAME", help="further metrics to draw (docs/logs.md)")
    add("--videos", type=int, default=2, metavar="N", help="videos of each run on the page; default: 2")
    add("--max_mb", type=float, default=32, help="megabytes of videos on the page; default: 32")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        if args.videos < 0:
            raise UserError(f"--videos {args.videos} must be at least 0")
        if not args.max_mb >= 0:  # also refuses nan
            raise UserError(f"--max_mb {args.max_mb:g} must be at least 0")
        figures.pyplot()  # fails early if matplotlib is missing
        runs, notes = read_runs(args.logdirs)
        for note in notes:
            print(note, file=sys.stderr)
        groups = group_runs(runs)
        check_metrics(args.metrics, groups)
        with figures.look():
            if args.out or not args.html:
                figures.save(figures.figure(groups, args.metrics), args.out or Path("curves.png"))
            if args.html:
                page.write(args.html, groups, args.metrics, args.videos, args.max_mb * 1e6)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
