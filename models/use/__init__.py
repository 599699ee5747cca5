"""Using a trained learner: `python main.py predict | evaluate | export RUN`."""
