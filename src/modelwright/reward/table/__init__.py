"""Tables of scores, evidence about them, and calibrated rewards for trainers."""
