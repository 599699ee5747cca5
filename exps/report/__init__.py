"""What compares runs: tables, figures, pages and pictures.

    python -m exps.report FOLDER [NAME=FOLDER ...] [--plot accuracy.png] [--html page.html]
    python -m exps.report.gallery --dataset D exemplars.png

It reads what runs have written and imports neither main.py nor the experiments, which both write pages.
"""
