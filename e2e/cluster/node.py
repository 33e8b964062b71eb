"""The components of the node: their arguments and configuration files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from e2e.cluster.layout import (
    API_PORT,
    BRIDGE,
    CNI_NETWORK,
    DNS_ADDRESS,
    NODE_NAME,
    POD_NETWORK,
    SERVICE_NETWORK,
    STORAGE_CLASS,
    Layout,
)
from e2e.cluster.processes import Component

ETCD = "https://127.0.0.1:2379"
CNI_PLUGINS = Path("/usr/lib/cni")
MAX_PODS = 200


def _write(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != content:
        path.write_text(content)
    return path


def resolver_file() -> Path:
    """Return the resolv.conf for pods: with upstream servers, since pods cannot reach a local stub resolver."""
    behind_stub = Path("/run/systemd/resolve/resolv.conf")
    text = Path("/etc/resolv.conf").read_text() if Path("/etc/resolv.conf").exists() else ""
    return behind_stub if "nameserver 127." in text and behind_stub.exists() else Path("/etc/resolv.conf")


class ControlPlane(NamedTuple):
    """The components every other one talks to, or that talk only to the API server."""

    etcd: Component
    apiserver: Component
    manager: Component
    scheduler: Component


def control_plane(layout: Layout, address: str) -> ControlPlane:
    """etcd, API server, controller manager and scheduler."""
    pki, program = layout.pki, layout.bin
    etcd = (
        str(program / "etcd"),
        f"--data-dir={layout.state / 'etcd'}",
        "--unsafe-no-fsync",  # a power failure may cost the state of a throw-away cluster
        f"--listen-client-urls={ETCD}",
        f"--advertise-client-urls={ETCD}",
        "--listen-peer-urls=http://127.0.0.1:2380",
        "--client-cert-auth",
        f"--trusted-ca-file={pki / 'ca.crt'}",
        f"--cert-file={pki / 'etcd.crt'}",
        f"--key-file={pki / 'etcd.key'}",
        "--log-level=warn",
    )
    apiserver = (
        str(program / "kube-apiserver"),
        f"--etcd-servers={ETCD}",
        f"--etcd-cafile={pki / 'ca.crt'}",
        f"--etcd-certfile={pki / 'kube-apiserver.crt'}",
        f"--etcd-keyfile={pki / 'kube-apiserver.key'}",
        f"--secure-port={API_PORT}",
        f"--advertise-address={address}",
        f"--client-ca-file={pki / 'ca.crt'}",
        f"--tls-cert-file={pki / 'kube-apiserver.crt'}",
        f"--tls-private-key-file={pki / 'kube-apiserver.key'}",
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
        f"--service-account-key-file={pki / 'service-accounts.key'}",
        f"--service-account-signing-key-file={pki / 'service-accounts.key'}",
        f"--service-cluster-ip-range={SERVICE_NETWORK}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--allow-privileged",
        f"--kubelet-certificate-authority={pki / 'ca.crt'}",
        f"--kubelet-client-certificate={pki / 'kubelet-client.crt'}",
        f"--kubelet-client-key={pki / 'kubelet-client.key'}",
        "--kubelet-preferred-address-types=InternalIP",  # nobody resolves the node's name
        f"--cert-dir={layout.state / 'apiserver'}",
    )
    manager = (
        str(program / "kube-controller-manager"),
        f"--kubeconfig={pki / 'kube-controller-manager.kubeconfig'}",
        f"--service-account-private-key-file={pki / 'service-accounts.key'}",
        f"--root-ca-file={pki / 'ca.crt'}",
        f"--cluster-signing-cert-file={pki / 'ca.crt'}",
        f"--cluster-signing-key-file={pki / 'ca.key'}",
        f"--flex-volume-plugin-dir={layout.state / 'volume-plugins'}",
        "--use-service-account-credentials",
        "--leader-elect=false",
        "--bind-address=127.0.0.1",
    )
    scheduler = (
        str(program / "kube-scheduler"),
        f"--kubeconfig={pki / 'kube-scheduler.kubeconfig'}",
        "--leader-elect=false",
        "--bind-address=127.0.0.1",
    )
    return ControlPlane(
        Component("etcd", etcd, (pki / "etcd.crt",)),
        Component("kube-apiserver", apiserver, (pki / "kube-apiserver.crt",)),
        Component("kube-controller-manager", manager, (pki / "kube-controller-manager.kubeconfig",)),
        Component("kube-scheduler", scheduler, (pki / "kube-scheduler.kubeconfig",)),
    )


def containerd(layout: Layout, pause_image: str) -> Component:
    """Containerd with the bridge network's configuration."""
    plugins = [
        {
            "type": "bridge",
            "bridge": BRIDGE,
            "isGateway": True,
            "ipMasq": True,
            "hairpinMode": True,
            "ipam": {
                "type": "host-local",
                "dataDir": str(layout.state / "network"),
                "ranges": [[{"subnet": POD_NETWORK}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        },
        {"type": "portmap", "capabilities": {"portMappings": True}},
    ]
    network = {"cniVersion": "1.0.0", "name": CNI_NETWORK, "plugins": plugins}
    _write(layout.config / "cni" / "10-bridge.conflist", json.dumps(network, indent=1))
    configuration = f"""version = 2
root = "{layout.containerd_root}"
state = "{layout.run}/containerd"

[grpc]
address = "{layout.containerd_socket}"

[plugins."io.containerd.internal.v1.opt"]
path = "{layout.state}/containerd-opt"

[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{pause_image}"
# Without CAP_SYS_RESOURCE runc cannot lower a score below its own and dies with "can't get final child's PID".
restrict_oom_score_adj = true
netns_mounts_under_state_dir = true

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"

[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
Root = "{layout.run}/runc"

[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{CNI_PLUGINS}"
conf_dir = "{layout.config}/cni"
"""
    file = _write(layout.config / "containerd.toml", configuration)
    return Component("containerd", ("/usr/bin/containerd", "--config", str(file)), (file,))


def kubelet(layout: Layout, address: str) -> Component:
    """The kubelet. Its folders lie in the state, except the few whose place is fixed in its source (see `teardown`)."""
    root = layout.state / "kubelet"
    configuration = {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": f"/{layout.cgroup}",
        "failSwapOn": False,
        "failCgroupV1": False,
        "containerRuntimeEndpoint": f"unix://{layout.containerd_socket}",
        "authentication": {
            "anonymous": {"enabled": False},
            "x509": {"clientCAFile": str(layout.pki / "ca.crt")},
            "webhook": {"enabled": True},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": str(layout.pki / "kubelet-server.crt"),
        "tlsPrivateKeyFile": str(layout.pki / "kubelet-server.key"),
        "clusterDNS": [DNS_ADDRESS],
        "clusterDomain": "cluster.local",
        "resolvConf": str(resolver_file()),
        "maxPods": MAX_PODS,
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "imageGCHighThresholdPercent": 100,  # images here come from a local build: nothing would pull them again
        "podLogsDir": str(layout.log / "pods"),
        "volumePluginDir": str(layout.state / "volume-plugins"),
        "nodeStatusUpdateFrequency": "4s",
    }
    file = _write(layout.config / "kubelet.json", json.dumps(configuration, indent=1))
    kubeconfig = layout.pki / "kubelet.kubeconfig"
    command = (
        str(layout.bin / "kubelet"),
        f"--config={file}",
        f"--kubeconfig={kubeconfig}",
        f"--hostname-override={NODE_NAME}",
        f"--node-ip={address}",
        f"--root-dir={root}",
        f"--cert-dir={root / 'pki'}",
    )
    return Component("kubelet", command, (file, kubeconfig, layout.pki / "kubelet-server.crt"))


def kube_proxy(layout: Layout) -> Component:
    """kube-proxy in iptables mode."""
    command = (
        str(layout.bin / "kube-proxy"),
        f"--kubeconfig={layout.pki / 'kube-proxy.kubeconfig'}",
        f"--hostname-override={NODE_NAME}",
        "--proxy-mode=iptables",
        f"--cluster-cidr={POD_NETWORK}",
        "--conntrack-max-per-core=0",
    )
    return Component("kube-proxy", command, (layout.pki / "kube-proxy.kubeconfig",))


def volume_provisioner(layout: Layout) -> Component:
    """Serves the default storage class."""
    command = (
        str(layout.bin / "volume-provisioner"),
        f"--kubeconfig={layout.pki / 'volume-provisioner.kubeconfig'}",
        f"--folder={layout.state / 'volumes'}",
        f"--storage-class={STORAGE_CLASS}",
    )
    return Component("volume-provisioner", command, (layout.pki / "volume-provisioner.kubeconfig",))
