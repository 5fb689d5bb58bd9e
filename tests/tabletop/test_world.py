import math

import numpy as np
import pytest

from st4vla_jax.tabletop.scene import Body, Scene, Slider
from st4vla_jax.tabletop.tasks import REACH_STEPS, Goal, Progress
from st4vla_jax.tabletop.world import FLOOR, HANDLE, HIGH, MAX_MOVE, MAX_TURN, Tip, World, half_turn


def cube(x=0.0, y=0.0, colour="red", shape="cube", yaw=0.0, z=0.0):
    return Body("object", colour, shape, 0.03, 0.04, x, y, z, yaw)


def bowl(x, y):
    return Body("container", "blue", "bowl", 0.05, 0.012, x, y)


def world(*bodies, slider=None, x=0.0, y=0.0, z=0.1, yaw=0.0, is_open=True):
    return World(Scene(list(bodies), slider, "plain", 0), Tip(x, y, z, yaw, is_open))


def go(w, dx=0.0, dy=0.0, dz=0.0, turn=0.0, is_open=None, times=1):
    for _ in range(times):
        w.move(dx, dy, dz, turn, w.tip.open if is_open is None else is_open)


def lower(w, z):
    while w.tip.z > z + 1e-9:
        go(w, dz=max(z - w.tip.z, -MAX_MOVE))


def test_motion_is_clipped_to_the_limits_and_the_workspace():
    w = world()
    go(w, dx=1.0, dy=-1.0, dz=0.01, turn=9.0)
    assert (w.tip.x, w.tip.y) == pytest.approx((MAX_MOVE, -MAX_MOVE))
    assert w.tip.z == pytest.approx(0.11)
    assert w.tip.yaw == pytest.approx(MAX_TURN)
    go(w, dx=1.0, dy=1.0, dz=1.0, turn=9.0, times=20)
    assert (w.tip.x, w.tip.y, w.tip.z) == pytest.approx(HIGH)
    assert w.tip.yaw == pytest.approx(math.pi / 2)


@pytest.mark.parametrize(
    ("x", "z", "held"),
    [(0.0, 0.02, 0), (0.021, 0.02, 0), (0.023, 0.02, None), (0.0, 0.045, None)],
)
def test_grasps_only_what_is_between_the_fingers(x, z, held):
    w = world(cube(), x=x)
    lower(w, z)
    go(w, is_open=False)
    assert w.held == held


@pytest.mark.parametrize(
    ("yaw", "turn", "held"),
    [(0.0, 0.0, 0), (0.4, 0.0, 0), (1.0, 0.0, None), (1.0, 0.8, 0), (math.pi - 0.1, 0.0, 0)],
)
def test_an_oblong_body_needs_an_aligned_gripper(yaw, turn, held):
    w = world(cube(shape="bar", yaw=yaw), yaw=turn)
    lower(w, 0.02)
    go(w, is_open=False)
    assert w.held == held


def test_half_turn_against_a_search():
    for angle in np.linspace(-7, 7, 57):
        turns = angle + math.pi * np.arange(-5, 6)
        assert abs(half_turn(angle)) == pytest.approx(np.abs(turns).min())


def test_carries_turns_and_drops_on_the_table_and_into_a_container():
    w = world(cube(), bowl(0.08, 0.0))
    lower(w, 0.02)
    go(w, is_open=False)
    go(w, dz=0.04, dx=0.04, turn=0.2, times=2)
    body = w.scene.bodies[0]
    assert (body.x, body.y, body.z) == pytest.approx((0.08, 0.0, 0.08))
    assert body.yaw == pytest.approx(0.4)
    go(w, is_open=True)
    assert body.z == FLOOR
    assert w.held is None
    assert w.touched == {0}


def test_opens_before_it_moves():
    w = world(cube())
    lower(w, 0.02)
    go(w, is_open=False)
    go(w, dx=0.04, dz=0.04, is_open=True)
    assert (w.scene.bodies[0].x, w.scene.bodies[0].z) == (0.0, 0.0)


@pytest.mark.parametrize(("x", "shape", "rests"), [
    (0.0, "cube", True), (0.012, "cube", True), (0.02, "cube", False), (0.0, "prism", False),
])  # fmt: skip
def test_stacks_on_the_middle_of_what_is_flat(x, shape, rests):
    w = world(cube(-0.1), cube(0.0, shape=shape, colour="blue"), x=-0.1)
    lower(w, 0.02)
    go(w, is_open=False)
    go(w, dz=0.04, times=3)
    while w.tip.x < x - 1e-9:
        go(w, dx=min(x - w.tip.x, MAX_MOVE))
    go(w, dz=-0.04, times=4)  # its underside stops on the other
    body, under = w.scene.bodies
    assert body.z == pytest.approx(under.top)
    go(w, is_open=True)
    if rests:
        assert body.z == under.top
    else:
        assert body.z == 0
        assert under.distance(body.x, body.y) >= body.radius + under.radius - 1e-9


def test_a_closed_gripper_rests_on_top_and_pushes_from_beside():
    w = world(cube(), is_open=False)
    go(w, dz=-0.04, times=4)
    assert w.tip.z == pytest.approx(w.scene.bodies[0].top)
    w = world(cube(), x=-0.06, is_open=False)
    lower(w, 0.02)
    go(w, dx=0.04, times=3)
    body = w.scene.bodies[0]
    assert body.x == pytest.approx(w.tip.x + body.radius)
    assert body.y == pytest.approx(0.0)
    assert w.touched == {0}


def test_an_open_gripper_moves_nothing():
    w = world(cube(), x=-0.06)
    lower(w, 0.02)
    go(w, dx=0.04, times=3)
    assert w.scene.bodies[0].x == 0
    assert w.touched == {0}


def test_what_is_pushed_into_another_body_touches_it():
    w = world(cube(), cube(0.06), x=-0.06, is_open=False)
    lower(w, 0.02)
    go(w, dx=0.03)
    assert w.touched == set()
    go(w, dx=0.025)
    assert w.touched == {0}
    go(w, dx=0.015)  # the tips themselves are still 2.6 cm short of the other's edge
    assert w.touched == {0, 1}


@pytest.mark.parametrize("yaw", [0.0, 0.7, -0.6])
def test_the_slider_moves_along_its_track_only(yaw):
    slider = Slider("red", 0.0, 0.0, yaw, 0.5)
    w = world(slider=slider)
    lower(w, 0.01)
    go(w, is_open=False)
    assert w.held == HANDLE
    go(w, -0.04 * math.sin(yaw), 0.04 * math.cos(yaw), 0.04)
    assert slider.opening == pytest.approx(0.5)
    go(w, 0.04 * math.cos(yaw), 0.04 * math.sin(yaw))
    assert slider.opening == pytest.approx(0.5 + 0.04 / slider.travel)
    assert (w.tip.x, w.tip.y) == pytest.approx(slider.handle)
    go(w, 0.04 * math.cos(yaw), 0.04 * math.sin(yaw), times=5)
    assert slider.opening == 1
    go(w, dz=0.04, dx=-0.04, is_open=True)
    assert slider.opening == 1
    assert w.tip.z > slider.height / 2


# --- Progress -----------------------------------------------------------------------------------


def follow(progress, w, **motion):
    go(w, **motion)
    progress.update(w)


def test_reach_must_be_held():
    w = world(cube(), z=0.05)
    progress = Progress((Goal("reach", 0),))
    for _ in range(REACH_STEPS - 1):
        follow(progress, w)
    follow(progress, w, dx=0.04)
    assert not progress.success
    follow(progress, w, dx=-0.04)
    for _ in range(REACH_STEPS - 1):
        assert not progress.success
        follow(progress, w)
    assert progress.success


def test_touching_another_object_ends_it():
    w = world(cube(), cube(0.1, colour="blue"), x=0.1, z=0.02)
    progress = Progress((Goal("reach", 0),))
    follow(progress, w)
    assert progress.failure == "touched the blue cube"
    assert not progress.success


def test_pick_must_lift_the_target():
    w = world(cube(), z=0.02)
    progress = Progress((Goal("pick", 0),))
    follow(progress, w, is_open=False)
    follow(progress, w, dz=0.04)
    assert not progress.success
    follow(progress, w, dz=0.04)
    assert progress.success


def test_place_must_let_go():
    w = world(cube(), bowl(0.04, 0.0), z=0.02)
    progress = Progress((Goal("place", 0, 1),))
    follow(progress, w, is_open=False)
    follow(progress, w, dx=0.04, dz=0.01)
    assert not progress.success
    follow(progress, w, is_open=True)
    assert progress.success


@pytest.mark.parametrize(("kind", "direction"), [("open_slider", 1), ("close_slider", -1)])
def test_the_slider_has_a_right_and_a_wrong_end(kind, direction):
    for sign in (1, -1):
        w = world(slider=Slider("red", 0.0, 0.0, 0.0, 0.5), z=0.01)
        progress = Progress((Goal(kind, HANDLE),))
        follow(progress, w, is_open=False)
        follow(progress, w, dx=0.03 * sign * direction)
        assert not progress.success
        follow(progress, w, dx=0.03 * sign * direction)
        assert progress.success == (sign == 1)
        assert progress.failure == ("" if sign == 1 else "moved the slider to the wrong end")


def test_two_steps_count_in_their_order():
    goals = (Goal("place", 0, 1), Goal("place", 2, 3))
    bodies = [cube(), bowl(0.1, 0.0), cube(0.0, 0.1), bowl(0.1, 0.1)]
    w, progress = world(*bodies), Progress(goals)
    bodies[2].x = 0.1  # the second one first
    progress.update(w)
    assert progress.number == 0
    bodies[0].x = 0.1
    progress.update(w)
    assert (progress.number, progress.success) == (1, False)
    progress.update(w)
    assert progress.success


def test_the_first_step_must_last():
    goals = (Goal("place", 0, 1), Goal("place", 2, 3))
    bodies = [cube(0.1), bowl(0.1, 0.0), cube(0.0, 0.1), bowl(0.1, 0.1)]
    w, progress = world(*bodies), Progress(goals)
    progress.update(w)
    bodies[0].x, bodies[2].x = 0.0, 0.1
    progress.update(w)
    assert not progress.success
    assert progress.failure == "the first step (place) was undone"


@pytest.mark.parametrize(
    ("gap", "z", "success"), [(0.029, 0.0, True), (0.031, 0.0, False), (0.02, 0.04, False)]
)
def test_move_near_is_measured_between_edges_on_the_table(gap, z, success):
    near = cube(0.0, z=z)
    w = world(near, cube(2 * near.radius + gap))
    progress = Progress((Goal("move_near", 0, 1),))
    progress.update(w)
    assert progress.success == success


def test_push_to_ends_on_the_mat():
    for x, success in ((0.029, True), (0.031, False)):
        w = world(cube(x), Body("mat", "green", "mat", 0.042, 0.0))
        progress = Progress((Goal("push_to", 0, 1),))
        progress.update(w)
        assert progress.success == success
