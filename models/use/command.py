"""The commands that use a trained network; importing this file does not import torch.

    python main.py predict RUN --images DIR          a table (CSV): file, class, probability, and the next four classes
    python main.py evaluate RUN [--data DIR]         accuracies on test pictures, as in results.json
    python main.py export RUN                        an ONNX file, and a JSON file that says what goes in and comes out

RUN is a run's output folder.  Of several class orders the first is taken unless --seed names one; of several phases the
last unless --phase does (a run keeps the last `keep_checkpoints`).
"""

import argparse
import csv
import itertools
import json
import sys
from collections.abc import Sequence

from utils import cli
from utils.files import write_csv, write_text
from utils.results.output import check_is_run, seed_folder

COMMANDS = {
    "predict": "The classes of pictures, as a table (CSV): file, class, probability, and the next four classes.",
    "evaluate": "Accuracies on test pictures, as in results.json.",
    "export": "The network as an ONNX file, with a JSON file beside it: the transform of its input, the class names.",
}


OUTPUTS = {
    "predict": "the CSV (default: the terminal)",
    "evaluate": "write all figures there too, as JSON",
    "export": "the ONNX file (default: RUN/seed<N>/phase<NN>.onnx); the JSON is FILE.json",
}


def run(argv: Sequence[str]) -> int:
    """One of `COMMANDS`, with its arguments.  Returns the exit code.  Raises UserError for what is wrong."""
    options = _parser(argv[0]).parse_args(argv[1:])
    check_is_run(options.run)
    from models.use.learner import Learner  # imports torch: a wrong folder is answered at once

    chosen = {name: getattr(options, name) for name in ("seed", "phase", "device", "classifier")}
    learner = Learner(options.run, **chosen)
    print(cli.visible(learner.description), file=sys.stderr)
    return {"predict": _predict, "evaluate": _evaluate, "export": _export}[argv[0]](learner, options)


def _parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{cli.program('main.py')} {command}", description=COMMANDS[command], allow_abbrev=False
    )
    parser.add_argument("run", type=cli.path, metavar="RUN", help="output folder of the run")
    if command == "predict":
        pictures = "a picture, or a folder of them"
        parser.add_argument("--images", type=cli.path, required=True, metavar="DIR", help=pictures)
    if command == "evaluate":
        data = "a dataset's folder, or a folder of class folders (default: the run's own dataset)"
        parser.add_argument("--data", type=cli.path, metavar="DIR", help=data)
    what = "head: the network's logits; nme: the nearest class mean, which often forgets less"
    default = None if command == "evaluate" else "head"
    fallback = default or "both, as far as the run has them"
    parser.add_argument("--classifier", choices=("head", "nme"), default=default, help=f"{what} (default: {fallback})")
    parser.add_argument("--output", type=cli.output_file, metavar="FILE", help=OUTPUTS[command])
    parser.add_argument("--seed", type=int, metavar="N", help="class order (default: the first)")
    parser.add_argument("--phase", type=int, metavar="N", help="phase, counted from 0 (default: the last one kept)")
    parser.add_argument("--device", default="auto", help='as the config\'s "device" (default: %(default)s)')
    return parser


def _predict(learner, options: argparse.Namespace) -> int:
    """Exit code 1 where some pictures can't be read: they are listed and left out."""
    from models.use.predictions import header, pictures_of, rows

    broken: list[str] = []
    predictions = rows(learner, pictures_of(options.images), broken)
    if options.output:
        write_csv(options.output, header(learner), list(predictions))
        print("written:", cli.visible(str(options.output)), file=sys.stderr)
    else:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        for row in itertools.chain([header(learner)], predictions):
            writer.writerow(map(cli.visible, row))
    for message in broken:
        print(cli.visible(message), file=sys.stderr)
    return 1 if broken else 0


def _evaluate(learner, options: argparse.Namespace) -> int:
    from models.use.predictions import evaluate, in_words

    figures = evaluate(learner, options.data)
    print(cli.visible("\n".join(in_words(figures, options.classifier))))
    if options.output:
        write_text(options.output, json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
        print("written:", cli.visible(str(options.output)), file=sys.stderr)
    return 0


def _export(learner, options: argparse.Namespace) -> int:
    from models.use.export import export

    default = seed_folder(learner.folder, learner.seed) / f"phase{learner.phase:02d}.onnx"
    print(cli.visible("\n".join(map(str, export(learner, options.output or default)))))
    return 0
