"""How well fitted Q evaluation ranks the actors of chains: its values against true scores.

    python benchmarks/rank.py LOG_DIR [LOG_DIR ...] --out values.jsonl

ranks the actors of every finished run below the folders, as `pogo rank` does, and compares with the
deterministic scores of the run's last evaluation. Runs that are in the output file already are not
ranked again.
"""

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

from pogo_torchrl.experiments.trained_run import open_run
from pogo_torchrl.report import bootstrap, rank_correlation
from pogo_torchrl.report.intervals import mean
from pogo_torchrl.report.run_logs import read_evaluations
from pogo_torchrl.trainers.ranking import rank_actors


def rank_run(folder: Path, updates: int, critics: int) -> dict | None:
    """Values and scores of the actors of a run; None if they are not of the same update."""
    run = open_run(folder, device="cpu")
    evaluations = read_evaluations(folder / "training" / "evaluations.csv", run.loss.num_actors)
    at_step = evaluations.scores[evaluations.steps == run.trainer.collected_frames, :, 0]
    if not len(at_step):
        return None
    started = time.perf_counter()
    values = rank_actors(
        run.deployed_actors(),
        run.replay_buffer[:],
        gamma=run.cfg.gamma,
        updates=updates,
        num_critics=critics,
    )
    return {
        "run": str(folder),
        "data": run.replay_buffer.fingerprint(),
        "task": run.cfg.task,
        "scores": at_step[0].tolist(),
        "values": [value.value for value in values],
        "seconds": time.perf_counter() - started,
    }


def summary(found: list[dict]) -> str:
    """Rank correlations within chains and over all actors, and the scores of the choice."""
    within = [rank_correlation(one["values"], one["scores"]) for one in found]
    within = [value for value in within if np.isfinite(value)]
    low_high = bootstrap([within], mean)
    scores = [one["scores"] for one in found]
    chosen = [one["scores"][int(np.argmax(one["values"]))] for one in found]
    of_all, best = np.mean([np.mean(s) for s in scores]), np.mean([max(s) for s in scores])
    lines = [
        f"{len(found)} chains, {sum(map(len, scores))} actors",
        "within chains, Spearman: mean {:.2f} [{:.2f}, {:.2f}]".format(*low_high),
        f"mean score of the actor with the highest value {np.mean(chosen):.1f}, of the last actor "
        f"{np.mean([s[-1] for s in scores]):.1f}, of all {of_all:.1f}, of the best {best:.1f}",
    ]
    groups = defaultdict(list)
    for one in found:
        groups[one["task"], one["data"]] += zip(one["values"], one["scores"])
    for (task, data), pairs in groups.items():
        correlation = rank_correlation(*zip(*pairs))
        lines.append(f"{task} ({data[:6]}), all {len(pairs)} actors, Spearman: {correlation:.2f}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("log_dir", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("values.jsonl"))
    parser.add_argument("--updates", type=int, default=3000)
    parser.add_argument("--critics", type=int, default=4)
    parser.add_argument("--limit", type=int, help="number of runs to rank in this call")
    args = parser.parse_args()
    lines = args.out.read_text().splitlines() if args.out.exists() else []
    found = [json.loads(line) for line in lines]
    done = {one["run"] for one in found}
    runs = sorted(path.parent for root in args.log_dir for path in root.rglob("done.json"))
    for folder in [run for run in runs if str(run) not in done][: args.limit]:
        result = rank_run(folder, args.updates, args.critics)
        if result is None:
            print(f"{folder}: no evaluation of its newest checkpoint")
            continue
        found.append(result)
        print(result["run"], *(f"{result[name]}" for name in ("scores", "values", "seconds")))
        with args.out.open("a") as file:
            file.write(json.dumps(result) + "\n")
    print(summary(found))


if __name__ == "__main__":
    main()
