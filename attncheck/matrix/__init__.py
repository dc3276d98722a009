"""The same cases in several environments, a combination of versions each: `attncheck matrix`."""
