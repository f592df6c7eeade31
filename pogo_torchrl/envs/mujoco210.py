"""MuJoCo 2.1.0 physics on a modern MuJoCo.

D4RL's version 2 tasks were simulated by MuJoCo 2.1.0, and policies meet slightly other worlds in
later releases: on Gymnasium's `-v4` models one step of Walker2d differs by up to 2.7. According to
MuJoCo's changelog, two changes are to blame, and both can be undone on a compiled model:

* 2.1.2: a capsule's mass and inertia were those of a cylinder that ends half a radius beyond the
  capsule's segment; now they are exact.
* 3.5.0: a contact's margin was the larger of its two geoms' margins; now it is their sum.

Two more, found by stepping both side by side, matter to the ant in its maze; `runge_kutta_step`
undoes them:

* 4.0.0: a Runge-Kutta step rotated a body by its mean angular velocity; now in another way.
* before 3.3: a sphere or a capsule's end whose centre is inside a box counted as one radius deep,
  however deep it is; now its true depth counts.
"""

from __future__ import annotations

import mujoco
import numpy as np

_RUNGE_KUTTA_WEIGHTS = np.array([1.0, 2.0, 2.0, 1.0]) / 6
_SMALLEST_DEPTH = 0.05  # shallower contacts need no second look: geoms here have larger radii


def compile_legacy(spec: mujoco.MjSpec) -> mujoco.MjModel:
    """Compile a model that moves as it did in MuJoCo 2.1.0.

    Args:
        spec: the model's specification. It is used up: its capsules become cylinders.

    Returns:
        The model. Its shapes are those of `spec`; the masses and inertias of capsules and the
        distance at which contacts begin are those of MuJoCo 2.1.0.

    Raises:
        ValueError: if the geoms have different margins (see `restore_contact_margin`).

    Source: MuJoCo's changelog, versions 2.1.2 and 3.5.0.

    Example:
        >>> import mujoco
        >>> xml = '''<mujoco><worldbody><body><freejoint/>
        ...   <geom type="capsule" size="0.1 0.2" density="1000"/></body></worldbody></mujoco>'''
        >>> model = compile_legacy(mujoco.MjSpec.from_string(xml))
        >>> float(model.body_mass[1])  # 1000 * pi * 0.1^2 * (0.4 + 0.1)
        15.70796...
    """
    # MuJoCo is about to drop this attribute of the XML and warns wherever it is compiled.
    total_mass = spec.compiler.settotalmass
    spec.compiler.settotalmass = -1
    model = spec.compile()
    for geom in spec.geoms:
        if geom.type == mujoco.mjtGeom.mjGEOM_CAPSULE:
            _to_longer_cylinder(geom)
    cylinders = spec.compile()
    if total_mass > 0:
        mujoco.mj_setTotalmass(cylinders, total_mass)
    for field in ("body_mass", "body_inertia", "body_ipos", "body_iquat"):
        getattr(model, field)[:] = getattr(cylinders, field)
    # Constants that depend on the masses (inverse weights, subtree masses) follow.
    mujoco.mj_setConst(model, mujoco.MjData(model))
    restore_contact_margin(model)
    return model


def _to_longer_cylinder(geom: mujoco.MjsGeom) -> None:
    radius = geom.size[0]
    geom.type = mujoco.mjtGeom.mjGEOM_CYLINDER
    ends = np.array(geom.fromto)
    if np.isfinite(ends).all():  # given by its two end points
        start, end = ends[:3], ends[3:]
        overhang = (end - start) / np.linalg.norm(end - start) * radius / 2
        geom.fromto = np.concatenate([start - overhang, end + overhang])
    else:  # given by a centre and a half-length
        geom.size = [radius, geom.size[1] + radius / 2, 0.0]


def restore_contact_margin(model: mujoco.MjModel) -> None:
    """Make contacts begin at the distance at which they began in MuJoCo 2.1.0.

    With one margin m for all geoms, max(m, m) = m/2 + m/2: halving every margin is exact.

    Args:
        model: changed in place; left alone where MuJoCo is older than 3.5.

    Raises:
        ValueError: if the geoms have different margins; then no margins of today give the old
            distance for every pair of geoms.

    Source: MuJoCo's changelog, version 3.5.0.

    Example:
        >>> import mujoco
        >>> xml = '''<mujoco><worldbody><geom type="plane" size="1 1 1" margin="0.01"/><body>
        ...   <freejoint/><geom size="1" margin="0.01"/></body></worldbody></mujoco>'''
        >>> model = mujoco.MjModel.from_xml_string(xml)
        >>> restore_contact_margin(model)
        >>> data = mujoco.MjData(model)
        >>> data.qpos[2] = 1.009  # a gap of 0.009, less than the margin of 0.01
        >>> mujoco.mj_forward(model, data)
        >>> data.ncon
        1
        >>> data.qpos[2] = 1.011
        >>> mujoco.mj_forward(model, data)
        >>> data.ncon
        0
    """
    if tuple(int(part) for part in mujoco.__version__.split(".")[:2]) < (3, 5):
        return
    margins = np.unique(model.geom_margin)
    if len(margins) > 1:
        raise ValueError(
            f"geom margins are {margins.tolist()}, but the contacts of MuJoCo 2.1.0 can only be "
            "restored where all geoms share one margin; give every geom of the model the same one"
        )
    model.geom_margin[:] /= 2


def runge_kutta_step(model: mujoco.MjModel, data: mujoco.MjData) -> None:
    """Advance by one time step with the fourth-order Runge-Kutta method of MuJoCo 2.1.0.

        q_i = q (+) a_i h v_{i-1},  v_i = v + a_i h f_{i-1},  f_i = acceleration(q_i, v_i)
        q'  = q (+) h (v_1 + 2 v_2 + 2 v_3 + v_4) / 6
        v'  = v     + h (f_1 + 2 f_2 + 2 f_3 + f_4) / 6

    with a = 0, 1/2, 1/2, 1 and (+) MuJoCo's `mj_integratePos`, which rotates quaternions. No
    contact with a box is deeper than the other geom's radius. As in `mj_step`, a state that is not
    finite is reset and MuJoCo warns.

    Args:
        model: without activations; contacts with boxes must have an impedance that does not depend
            on their depth (`solimp` with two equal first values).
        data: changed in place: `qpos` [nq], `qvel` [nv] and `time` (s).

    Source: MuJoCo's documentation, "Computation", numerical integration.

    Example:
        >>> import mujoco
        >>> xml = '''<mujoco><worldbody><body>
        ...   <freejoint/><geom size="1"/></body></worldbody></mujoco>'''
        >>> model = mujoco.MjModel.from_xml_string(xml)
        >>> data = mujoco.MjData(model)
        >>> runge_kutta_step(model, data)
        >>> round(float(data.qpos[2]) * 1e6, 3)  # a fall of g h^2 / 2 with h = 2 ms, in micrometres
        -19.62
    """
    h = model.opt.timestep
    mujoco.mj_checkPos(model, data)
    mujoco.mj_checkVel(model, data)
    _forward(model, data)
    mujoco.mj_checkAcc(model, data)
    qpos, qvel = data.qpos.copy(), data.qvel.copy()
    velocities, accelerations = [qvel], [data.qacc.copy()]
    for fraction in (0.5, 0.5, 1.0):
        data.qacc_warmstart[:] = data.qacc
        data.qpos[:] = qpos
        mujoco.mj_integratePos(model, data.qpos, velocities[-1], fraction * h)
        velocities.append(qvel + fraction * h * accelerations[-1])
        data.qvel[:] = velocities[-1]
        _forward(model, data)
        accelerations.append(data.qacc.copy())
    data.qacc_warmstart[:] = data.qacc
    data.qpos[:] = qpos
    mujoco.mj_integratePos(model, data.qpos, _RUNGE_KUTTA_WEIGHTS @ np.array(velocities), h)
    data.qvel[:] = qvel + h * (_RUNGE_KUTTA_WEIGHTS @ np.array(accelerations))
    data.time += h


def _forward(model: mujoco.MjModel, data: mujoco.MjData) -> None:
    mujoco.mj_forwardSkip(model, data, mujoco.mjtStage.mjSTAGE_NONE, True)
    if data.ncon == 0 or data.contact.dist.min() >= -_SMALLEST_DEPTH:
        return
    # The position stage is right but for the depths; what follows from them is computed again.
    for contact in data.contact:
        types = model.geom_type[contact.geom]
        if mujoco.mjtGeom.mjGEOM_BOX in types and contact.efc_address >= 0:
            other = contact.geom[np.argmax(types != mujoco.mjtGeom.mjGEOM_BOX)]
            depth = min(-contact.dist, model.geom_size[other, 0])
            rows = slice(contact.efc_address, contact.efc_address + 2 * (contact.dim - 1))
            data.efc_pos[rows] = -depth
    mujoco.mj_forwardSkip(model, data, mujoco.mjtStage.mjSTAGE_POS, True)
