"""What the command line shows of a run: each module gathers one report, as plain data and text.

Reports are dataclasses of what JSON holds; `text()` gives the same for people. Nothing here
writes to a store, but for `collection`, which deletes what nobody needs.
"""
