"""The built-in video world: prompt grammar, renderer and a checker with ground truth."""
