"""The engine around the backbones: one way to train, test and predict for three tasks, and the command line's verbs.

Importing this package imports nothing else: the command line passes through here, and its help answers at once.
"""
