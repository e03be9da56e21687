"""The kernel's stamps on the run's clock, and what becomes of them when the wall clock is set."""

import socket
import struct
import sys
import time

import pytest

from replay.stamps import ANCILLARY_BYTES, ArrivalClock, ask_for_stamps
from replay.timerfd import now_ns

HOUR_NS = 3600 * 10**9
linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux stamps so")


class Wall:
    """A wall clock that somebody can set."""

    ahead_ns = 0

    def __call__(self):
        return time.time_ns() + self.ahead_ns

    def stamp(self):
        """As the kernel gives it."""
        return [(socket.SOL_SOCKET, 35, struct.pack("@qq", *divmod(self(), 10**9)))]


def test_a_stamp_comes_out_on_the_monotonic_clock():
    wall = Wall()
    clock = ArrivalClock(wall)
    before_ns = now_ns()
    arrival_ns = clock.arrival_ns(wall.stamp())
    assert before_ns - clock.error_ns <= arrival_ns <= now_ns() + clock.error_ns
    assert 0 <= clock.error_ns < 10**6


def test_no_stamp_is_no_time():
    clock = ArrivalClock()
    assert clock.arrival_ns([]) is None
    assert clock.arrival_ns([(socket.SOL_SOCKET, 1, b"12345678" * 2)]) is None


@pytest.mark.parametrize("step_ns", [HOUR_NS, -HOUR_NS, 10**7, -(10**7)])
def test_a_wall_clock_that_is_set_is_noticed_before_its_stamps_are_used(step_ns):
    wall = Wall()
    clock = ArrivalClock(wall)
    assert clock.sound(now_ns())
    wall.ahead_ns += step_ns
    assert not clock.sound(now_ns()), "what came meanwhile may be of either clock"
    assert clock.steps == 1
    assert clock.sound(now_ns())
    before_ns = now_ns()
    assert before_ns - clock.error_ns <= clock.arrival_ns(wall.stamp()) <= now_ns() + clock.error_ns


def test_being_held_up_between_two_clocks_is_no_step():
    wall, slow = Wall(), []

    def read():
        if slow:
            time.sleep(slow.pop())
        return wall()

    clock = ArrivalClock(read)
    slow.append(0.002)
    assert clock.sound(now_ns())
    assert clock.steps == 0


@linux
def test_the_kernel_stamps_what_a_socket_receives(kernel_stamps):
    clock = ArrivalClock()
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        peer, _ = server.accept()
        with peer:
            assert ask_for_stamps(client)
            before_ns = now_ns()
            peer.send(b"x")
            time.sleep(0.01)  # so that the time of reading is another
            data, ancillary, _, _ = client.recvmsg(10, ANCILLARY_BYTES)
            arrival_ns = clock.arrival_ns(ancillary)
    assert data == b"x"
    assert before_ns - clock.error_ns <= arrival_ns < now_ns()
