"""What events do to derivatives, and where they leave none.

Neuron j reaches x_i at a time that moves by dt = −(du_j·x̃_i + w_j dx_i)/(u̇_j·x̃_i); its velocity is f⁻ before and f⁺
after, so that at a fixed time later (Aizerman and Gantmakher 1958; Leine and Nijmeijer 2004, 7)

    dθ⁺ = dθ⁻ + (f⁻ − f⁺) dt.

Only u_j jumps: p and v̇_j are continuous. Hence events of several neurons at one time do not interfere, in whatever
order they come; their jumps commute. If the breakpoint sticks, f⁺ is the sliding velocity, and the same formula puts
dθ⁺ on the ray, which moves with x_i. At a release f⁺ = f⁻, and nothing jumps. (A neuron that slides through the origin
of the (w, b) plane has an event there, at which the length along its ray vanishes.)

On the verge between sticking and passing nothing special happens: the velocity beyond vanishes, f⁺ is the same, and
the two courses part with higher powers of time. Only where a point is passed at a vanishing speed, and the velocity
jumps, is there no derivative: dt has no bound.
"""

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from gradflow.clarke import Mode, find_cell, point_of
from gradflow.events import SHARE, distances
from gradflow.hybrid import Problem, State
from gradflow.network import ReluNetwork
from gradflow.outcome import Sensitivity, Status

_GRAZES = 1e-6  # of the speed after a point is passed, that the speed before must exceed


def absent(net: ReluNetwork) -> Bool[Array, " k"]:
    """Neurons with weights 0, such as padding. What they are moved by changes the others to second order only, and
    themselves by what no linear map gives.
    """
    return (net.w == 0) & (net.b == 0) & (net.v == 0)


def starts_on_point(problem: Problem, state: State) -> Bool[Array, ""]:
    """Whether some neuron's breakpoint is on a point, so that its pattern depends on where it is moved to."""
    net, x = state.net, problem.points.x
    mode = Mode(find_cell(net, x), jnp.full_like(state.mode.ray, -1))
    gap = jnp.min(jnp.abs(distances(net, mode, problem.points)), axis=0)
    on = gap <= problem.tolerance(jnp.ones_like(state.time), state.least).landing(net, problem.points)
    return jnp.any(on & ~absent(net))


class Event(eqx.Module):
    """What changed at the end of a step, per neuron: the `ray` that was met, its point's `place` and position `at`,
    whether the neuron `meets` it, or `turns`, that is goes through the origin instead, and the z_j on both sides.
    """

    ray: Int[Array, " k"]
    place: Int[Array, " k"]
    at: Float[Array, " k"]
    meets: Bool[Array, " k"]
    turns: Bool[Array, " k"]
    before: Float[Array, "2 k"]
    after: Float[Array, "2 k"]


def event_of(problem: Problem, before: State, after: State) -> Event:
    n = problem.points.x.shape[0]
    old, new = before.mode, after.mode
    step = (new.cell - old.cell) % (2 * n)
    ray = jnp.where(step == 1, old.cell, new.cell)  # between the two cells
    adjacent = (step == 1) | (step == 2 * n - 1)
    meets = ~old.sliding & jnp.where(new.sliding, True, adjacent)
    ray = jnp.where(new.sliding, jnp.maximum(new.ray, 0), ray)
    turns = old.sliding & (new.ray != old.ray) & (after.net.w == 0) & (after.net.b == 0)
    field = problem.field(after)
    p = field.weights(after.net.lines).p
    there = field.in_mode(old)
    place = point_of(ray, n)
    return Event(ray, place, problem.points.x[place], meets, turns, there.pull(p), field.pull(p))


def judge_events(problem: Problem, before: State, after: State) -> Sensitivity:
    """Whether the derivative exists at the events between two states."""
    event, net = event_of(problem, before, after), after.net
    reach = jnp.hypot(1, event.at)

    def speed(z):
        return net.v * (z[0] * event.at + z[1]) / reach

    coming, going = speed(event.before), speed(event.after)
    # Passing at almost no speed, with a velocity that jumps: the time of that changes without bound.
    grazes = event.meets & ~after.mode.sliding & (jnp.abs(coming) <= _GRAZES * jnp.abs(going))
    p = problem.field(after).weights(net.lines).p[event.place]
    own = jnp.abs(net.v) * p * reach
    # Events later than the end of the flow have no part in it, earlier ones have.
    counts = event.meets & (own > SHARE * problem.rtol * jnp.abs(coming))
    at_end = (after.status != Status.running) & jnp.any(counts)
    found = Sensitivity.where(jnp.any(grazes & counts), Sensitivity.grazes, Sensitivity.exists)
    return Sensitivity.where(at_end, Sensitivity.ends_on_event, found)


def jump(problem: Problem, before: State, after: State, change: ReluNetwork, x: Float[Array, " n"]) -> ReluNetwork:
    """What events at the end of a step make of a change of the network, and of the points; linear in both."""
    event, net = event_of(problem, before, after), after.net
    late = change.w * event.at + change.b + net.w * x[event.place]
    speed = net.v * (event.before[0] * event.at + event.before[1])
    meets = event.meets & (speed != 0)
    time = jnp.where(meets, -late / jnp.where(meets, speed, 1), 0)
    # Through the origin: the length along the ray vanishes.
    stands = problem.points.x
    ray_x = stands[point_of(jnp.maximum(before.mode.ray, 0), stands.shape[0])]
    along, pace = change.w - ray_x * change.b, net.v * (event.before[0] - ray_x * event.before[1])
    turns = event.turns & (pace != 0)
    time = jnp.where(turns, -along / jnp.where(turns, pace, 1), time)
    kick = (net.v * time)[None] * (event.before - event.after)
    return ReluNetwork(change.w + kick[0], change.b + kick[1], change.v)
