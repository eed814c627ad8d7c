"""The command line: one short function per command that calls the Python API and prints.

Commands import what they need when they run, so that ``ingle --help`` starts fast.
"""
