"""Published numbers beside ours: rows of published tables, and the config that reproduces each.

    python -m exps.reproduce --list
    python -m exps.reproduce --run ROW [--dry-run] [key=value ...]
    python -m exps.reproduce --write

A file FILE.json of this folder is one published table: source, url and table say where it stands, note what its
protocol is; config holds main.py's keys of all its rows.  A row has name, method, base (a config, from this folder),
config (its own keys on top), average and last (the published average incremental and last accuracy in percent, null
where there is none), classifier (whose accuracy it is: cnn, nme, student or svm; default cnn), note, and dataset and
protocol where they are not the table's.

--run starts main.py with the row's config in outputs/reproduce/ROW, goes on where an earlier run stopped, and then
writes our number with date, machine and commit to results.json of this folder and to docs/reproduced.md.  A run whose
key=value change what is computed is listed apart: it is no reproduction.  --dry-run shows the command and estimates
its hours here from two epochs of each kind; where that is a GPU, the estimate is kept.  --write writes the page anew.
"""
