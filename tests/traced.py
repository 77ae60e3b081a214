"""What is in a traced program (a jaxpr): its equations, the programs in these, and the arrays that they make."""

import jax
import jax.extend.core

PROGRAMS = (jax.extend.core.ClosedJaxpr, jax.extend.core.Jaxpr)


def inner(equation) -> list:
  """The programs that an equation runs: bodies, branches, calls."""
  parts = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda part: isinstance(part, PROGRAMS))
  return [getattr(part, "jaxpr", part) for part in parts if isinstance(part, PROGRAMS)]


def equations(program) -> list:
  """The equations of a program and of all programs in it."""
  return [found for one in program.eqns for found in (one, *(e for part in inner(one) for e in equations(part)))]


def arrays(program) -> list:
  """Shape and type of every array that is made."""
  return [made.aval for one in equations(program) for made in one.outvars if hasattr(made.aval, "size")]
