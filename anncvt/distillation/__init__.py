"""The parts of a PKKD run; :mod:`anncvt.pkkd` puts them together."""
