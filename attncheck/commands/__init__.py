"""The commands, by kind. Each parses, calls and renders; `attncheck.cli` puts them together."""
