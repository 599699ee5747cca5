"""Published numbers: rows of published tables, the config that reproduces each, and the runs that anybody recorded.

    python -m exps.reproduce --list
    python -m exps.reproduce --run ROW [--dry-run] [key=value ...]
    python -m exps.reproduce --record RESULTS.JSON [--note "who, on what machine"]

A file FILE.json of this folder is one published table: source, url and table say where it stands, note what its
protocol is; config holds main.py's keys of all its rows.  A row has name, method, base (a config, from this folder),
config (its own keys on top), average and last (the published average incremental and last accuracy in percent, null
where there is none), classifier (whose accuracy it is: cnn, nme, student or svm; default cnn), note, and dataset and
protocol where they are not the table's.

--run prints main.py's command of a row and starts it, in outputs/reproduce/ROW unless output_dir says otherwise; the
same command goes on where it stopped.  --dry-run only prints it, after the check of its keys.

--record takes the results.json of a finished run, finds the rows that have the same config (device, folders, class
orders and other keys that don't change the experiment may differ), and writes the run's numbers to recorded.json of
this folder and to docs/reproduced.md.
"""
