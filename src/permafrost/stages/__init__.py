"""Stages: one file per stage of dvc.yaml, of the same name.

Each reads its inputs, calls the floors below and writes its outputs.
"""
