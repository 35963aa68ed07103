"""Whole models on one device: random weights and pages, so that any context can be measured."""
