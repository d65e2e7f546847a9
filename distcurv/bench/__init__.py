"""Measurements behind ``distcurv bench``: what a step, a refresh and a message cost, and why."""
