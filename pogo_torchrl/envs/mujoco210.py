"""MuJoCo 2.1.0 physics on current MuJoCo releases.

D4RL's version 2 tasks were simulated by MuJoCo 2.1.0. Later releases simulate slightly different
physics: on Gymnasium's ``-v4`` models, one step of Walker2d differs by as much as 2.7. According to
MuJoCo's changelog, two changes are responsible, and both can be undone on a compiled model:

* 2.1.2: a capsule's mass and inertia were those of a cylinder that extends half a radius beyond the
  capsule's segment; now they are exact.
* 3.5.0: a contact's margin was the larger of its two geoms' margins; now it is their sum.

Two further changes, found by comparing single steps of both versions, affect the ant in its maze.
:func:`runge_kutta_step` undoes them:

* 4.0.0: a Runge-Kutta step rotated a body by its mean angular velocity; the integration of
  rotations has changed.
* before 3.3: a sphere or an end of a capsule whose centre is inside a box had a penetration depth
  of one radius; now it has its true depth.
"""

from __future__ import annotations

import mujoco
import numpy as np

_RUNGE_KUTTA_WEIGHTS = np.array([1.0, 2.0, 2.0, 1.0]) / 6
_SMALLEST_DEPTH = 0.05  # shallower contacts need no correction: all geoms have larger radii


def compile_legacy(spec: mujoco.MjSpec) -> mujoco.MjModel:
    """Compile a model with the physics of MuJoCo 2.1.0.

    Args:
        spec: the specification of the model. Modified in place: its capsules become cylinders.

    Returns:
        The model. It has the shapes of ``spec``; masses and inertias of capsules, and the distance
        at which contacts begin, are those of MuJoCo 2.1.0.

    Raises:
        ValueError: when the geoms have different margins, see :func:`restore_contact_margin`.

    Source: MuJoCo's changelog, versions 2.1.2 and 3.5.0.

    Example:
        >>> import mujoco
        >>> xml = '''<mujoco><worldbody><body><freejoint/>
        ...   <geom type="capsule" size="0.1 0.2" density="1000"/></body></worldbody></mujoco>'''
        >>> model = compile_legacy(mujoco.MjSpec.from_string(xml))
        >>> float(model.body_mass[1])  # 1000 * pi * 0.1^2 * (0.4 + 0.1)
        15.70796...
    """
    # MuJoCo has deprecated this XML attribute and warns when it is compiled.
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
    # Recompute the constants that depend on the masses (inverse weights, subtree masses).
    mujoco.mj_setConst(model, mujoco.MjData(model))
    restore_contact_margin(model)
    return model


def _to_longer_cylinder(geom: mujoco.MjsGeom) -> None:
    radius = geom.size[0]
    geom.type = mujoco.mjtGeom.mjGEOM_CYLINDER
    ends = np.array(geom.fromto)
    if np.isfinite(ends).all():  # defined by its two end points
        start, end = ends[:3], ends[3:]
        overhang = (end - start) / np.linalg.norm(end - start) * radius / 2
        geom.fromto = np.concatenate([start - overhang, end + overhang])
    else:  # defined by its centre and half-length
        geom.size = [radius, geom.size[1] + radius / 2, 0.0]


def restore_contact_margin(model: mujoco.MjModel) -> None:
    """Restore the distance at which contacts began in MuJoCo 2.1.0.

    With one margin m for all geoms, max(m, m) = m/2 + m/2, so halving all margins is exact.

    Args:
        model: the model, modified in place; not modified if MuJoCo is older than 3.5.

    Raises:
        ValueError: when the geoms have different margins, for which the old distances cannot be
            reproduced for all pairs of geoms.

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
            "restored if all geoms have the same margin; set one margin for all geoms of the model."
        )
    model.geom_margin[:] /= 2


def runge_kutta_step(model: mujoco.MjModel, data: mujoco.MjData) -> None:
    """Advance by one time step with the fourth-order Runge-Kutta method of MuJoCo 2.1.0.

        q_i = q (+) a_i h v_{i-1},  v_i = v + a_i h f_{i-1},  f_i = acceleration(q_i, v_i)
        q'  = q (+) h (v_1 + 2 v_2 + 2 v_3 + v_4) / 6
        v'  = v     + h (f_1 + 2 f_2 + 2 f_3 + f_4) / 6

    with a = 0, 1/2, 1/2, 1 and (+) MuJoCo's ``mj_integratePos``, which rotates quaternions. The
    depth of a contact with a box is limited to the radius of the other geom. As in ``mj_step``, a
    state that is not finite is reset and MuJoCo warns.

    Args:
        model: a model without activations. Contacts with boxes must have an impedance that does not
            depend on their depth (``solimp`` with two equal first values).
        data: modified in place: ``qpos [nq]``, ``qvel [nv]`` and ``time`` (s).

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
    # The position stage is correct except for the depths; recompute everything that follows it.
    for contact in data.contact:
        types = model.geom_type[contact.geom]
        if mujoco.mjtGeom.mjGEOM_BOX in types and contact.efc_address >= 0:
            other = contact.geom[np.argmax(types != mujoco.mjtGeom.mjGEOM_BOX)]
            depth = min(-contact.dist, model.geom_size[other, 0])
            rows = slice(contact.efc_address, contact.efc_address + 2 * (contact.dim - 1))
            data.efc_pos[rows] = -depth
    mujoco.mj_forwardSkip(model, data, mujoco.mjtStage.mjSTAGE_POS, True)
