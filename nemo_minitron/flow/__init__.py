"""`minitron flow`: its steps as data, their configurations, what is left open and chosen, the run and its summary.

Imports every stage; only the command line and integrations import it.
"""
