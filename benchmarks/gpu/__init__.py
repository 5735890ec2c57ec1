"""One command for a GPU: proof, tuning and tables in ten minutes. See `python -m benchmarks.gpu --help`.

`parts` says what is measured and in which order, `runner` runs it in processes of its own, `rows` keeps what was
measured, `report` makes tables and plots of it. Run it from the root of the repository, installed or not.
"""
