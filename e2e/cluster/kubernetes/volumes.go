package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/wait"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"
)

const (
	provisionerName       = "tunesmith.dev/local"
	provisionerAnnotation = "pv.kubernetes.io/provisioned-by"
)

// provisioner gives every claim of its storage class a folder on this machine. It re-lists instead of watching: a one-node
// cluster has few claims, and a pass that starts from nothing cannot miss one.
type provisioner struct {
	client kubernetes.Interface
	folder string
	class  string
}

func newVolumeProvisionerCommand() *cobra.Command {
	var kubeconfig, folder, class string
	command := &cobra.Command{
		Use:   "volume-provisioner",
		Short: "Gives each claim of a storage class a folder on this machine, and removes it when the claim is gone.",
		RunE: func(command *cobra.Command, _ []string) error {
			config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
			if err != nil {
				return err
			}
			client, err := kubernetes.NewForConfig(config)
			if err != nil {
				return err
			}
			p := provisioner{client: client, folder: folder, class: class}
			wait.UntilWithContext(command.Context(), func(ctx context.Context) {
				if err := p.pass(ctx); err != nil {
					klog.ErrorS(err, "pass failed, the next one tries again")
				}
			}, time.Second)
			return nil
		},
	}
	command.SetContext(context.Background())
	command.Flags().StringVar(&kubeconfig, "kubeconfig", "", "how to reach the API server")
	command.Flags().StringVar(&folder, "folder", "", "absolute path of the folder that holds the volumes")
	command.Flags().StringVar(&class, "storage-class", "local", "name of the storage class to serve")
	return command
}

func (p provisioner) pass(ctx context.Context) error {
	claims, err := p.client.CoreV1().PersistentVolumeClaims("").List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	var failures []error
	for _, claim := range claims.Items {
		if claim.Status.Phase == corev1.ClaimPending && claim.Spec.VolumeName == "" && claim.Spec.StorageClassName != nil && *claim.Spec.StorageClassName == p.class {
			failures = append(failures, p.provision(ctx, &claim))
		}
	}
	volumes, err := p.client.CoreV1().PersistentVolumes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	for _, volume := range volumes.Items {
		if volume.Annotations[provisionerAnnotation] == provisionerName && volume.Status.Phase == corev1.VolumeReleased {
			failures = append(failures, p.remove(ctx, &volume))
		}
	}
	return errors.Join(failures...)
}

func (p provisioner) provision(ctx context.Context, claim *corev1.PersistentVolumeClaim) error {
	name := "pvc-" + string(claim.UID)
	path := filepath.Join(p.folder, name)
	if err := os.MkdirAll(path, 0o777); err != nil {
		return err
	}
	// The kubelet does not change the owner of host folders, and pods run under any user; the umask must not matter.
	if err := os.Chmod(path, 0o777); err != nil {
		return err
	}
	kind := corev1.HostPathDirectory
	mode := corev1.PersistentVolumeFilesystem
	volume := &corev1.PersistentVolume{
		ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: map[string]string{provisionerAnnotation: provisionerName}},
		Spec: corev1.PersistentVolumeSpec{
			Capacity:                      corev1.ResourceList{corev1.ResourceStorage: claim.Spec.Resources.Requests[corev1.ResourceStorage]},
			AccessModes:                   claim.Spec.AccessModes,
			PersistentVolumeReclaimPolicy: corev1.PersistentVolumeReclaimDelete,
			StorageClassName:              p.class,
			VolumeMode:                    &mode,
			ClaimRef: &corev1.ObjectReference{
				Kind: "PersistentVolumeClaim", APIVersion: "v1", Namespace: claim.Namespace, Name: claim.Name, UID: claim.UID,
			},
			PersistentVolumeSource: corev1.PersistentVolumeSource{HostPath: &corev1.HostPathVolumeSource{Path: path, Type: &kind}},
		},
	}
	_, err := p.client.CoreV1().PersistentVolumes().Create(ctx, volume, metav1.CreateOptions{})
	if apierrors.IsAlreadyExists(err) {
		return nil
	}
	if err == nil {
		klog.InfoS("Provisioned", "claim", klog.KObj(claim), "path", path)
	}
	return err
}

func (p provisioner) remove(ctx context.Context, volume *corev1.PersistentVolume) error {
	path := volume.Spec.HostPath.Path
	if filepath.Dir(path) != filepath.Clean(p.folder) {
		return fmt.Errorf("volume %s lies in %s, which is not a folder of %s: it is left alone", volume.Name, path, p.folder)
	}
	if err := os.RemoveAll(path); err != nil {
		return err
	}
	err := p.client.CoreV1().PersistentVolumes().Delete(ctx, volume.Name, metav1.DeleteOptions{})
	if apierrors.IsNotFound(err) {
		return nil
	}
	return err
}
