{{/*
Fill in the values that a release of an older version does not have: `helm upgrade --reuse-values` replaces the chart's
defaults by that version's. files/values.yaml is a copy of values.yaml, which templates cannot read. Every template
begins with this. Argument: the root context.
*/}}
{{- define "tunesmith.complete" -}}
{{- include "tunesmith.fill" (list .Values (.Files.Get "files/values.yaml" | fromYaml)) -}}
{{- end -}}

{{/* Add missing keys to a map, in place; a `resources` map stays as the user set it. Arguments: list of the map and its defaults. */}}
{{- define "tunesmith.fill" -}}
{{- $values := index . 0 -}}
{{- range $key, $default := index . 1 -}}
{{- if not (hasKey $values $key) -}}
{{- $_ := set $values $key $default -}}
{{- else if and (kindIs "map" $default) (kindIs "map" (get $values $key)) (ne $key "resources") -}}
{{- include "tunesmith.fill" (list (get $values $key) $default) -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Prefix of every object of this release. */}}
{{- define "tunesmith.fullname" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{- .Release.Name | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Labels that identify the pods of a component. Arguments: list of the root context and the component. */}}
{{- define "tunesmith.selector" -}}
{{- $root := index . 0 -}}
app.kubernetes.io/name: {{ $root.Chart.Name }}
app.kubernetes.io/instance: {{ $root.Release.Name }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{/* Labels of an object. Arguments as above. */}}
{{- define "tunesmith.labels" -}}
{{- $root := index . 0 -}}
{{ include "tunesmith.selector" . }}
app.kubernetes.io/version: {{ $root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ $root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" $root.Chart.Name $root.Chart.Version }}
{{- end -}}

{{/* Registry and repository of an image. Arguments: list of the root context and the image's key under `images`. */}}
{{- define "tunesmith.repository" -}}
{{- include "tunesmith.image" . | regexFind "^[^@]*/[^:@]+" -}}
{{- end -}}

{{/* Full reference of an image. Arguments: list of the root context and the image's key under `images`. */}}
{{- define "tunesmith.image" -}}
{{- $root := index . 0 -}}
{{- $key := index . 1 -}}
{{- $image := index $root.Values.images $key -}}
{{- $registry := $image.registry | default $root.Values.images.registry -}}
{{- if not $registry -}}
{{- fail (printf "images.registry is empty: name the registry that holds the image %s, or set images.%s.registry" $image.repository $key) -}}
{{- end -}}
{{- if and $image.tag $image.digest -}}
{{- fail (printf "images.%s has both a tag and a digest: keep one of them" $key) -}}
{{- end -}}
{{- if $image.digest -}}
{{- printf "%s/%s@%s" $registry $image.repository $image.digest -}}
{{- else -}}
{{- printf "%s/%s:%s" $registry $image.repository ($image.tag | default $root.Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{/* Address of the gateway for clients inside the cluster. */}}
{{- define "tunesmith.gatewayUrl" -}}
{{- $port := int .Values.gateway.service.port -}}
http://{{ include "tunesmith.fullname" . }}-gateway.{{ .Release.Namespace }}.svc{{ if ne $port 80 }}:{{ $port }}{{ end }}
{{- end -}}

{{/* Address of the gateway for clients: `gateway.externalUrl`, the host of the Ingress, or its address inside the cluster. */}}
{{- define "tunesmith.clientUrl" -}}
{{- $ingress := .Values.gateway.ingress -}}
{{- if .Values.gateway.externalUrl -}}
{{- .Values.gateway.externalUrl -}}
{{- else if $ingress.enabled -}}
{{- printf "https://%s" $ingress.host -}}
{{- else -}}
{{- include "tunesmith.gatewayUrl" . -}}
{{- end -}}
{{- end -}}

{{/* How Prometheus scrapes a port of a pod. Arguments: list of the root context, the port and the monitor's values. */}}
{{- define "tunesmith.scrape" -}}
{{- $root := index . 0 -}}
port: {{ index . 1 }}
{{- with (index . 2).interval }}
interval: {{ . }}
{{- end }}
{{- if or $root.Values.metrics.requireToken (eq (index . 1) "agent") }}
authorization:
  credentials: {name: tunesmith-metrics-token, key: token}
{{- end }}
{{- end -}}

{{/* Labels of an object of the Prometheus Operator. Arguments: list of the root context, the component and the monitor's values. */}}
{{- define "tunesmith.monitorLabels" -}}
{{- include "tunesmith.labels" . }}
{{- with (index . 2).labels }}
{{ toYaml . }}
{{- end }}
{{- end -}}

{{/* Namespaces whose pools are shared, as a JSON list. */}}
{{- define "tunesmith.sharedPoolNamespaces" -}}
{{- toJson (.Values.serving.sharedPoolNamespaces | default (list .Release.Namespace)) -}}
{{- end -}}

{{/* Security contexts that the pod security standard `restricted` admits. */}}
{{- define "tunesmith.podSecurityContext" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "tunesmith.containerSecurityContext" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* Placement of a component's pods: spread over nodes, and the component's values. Arguments: root context and component. */}}
{{- define "tunesmith.placement" -}}
{{- $root := index . 0 -}}
{{- $values := index $root.Values (index . 1) -}}
{{- with $values.topologySpread }}
topologySpreadConstraints:
  {{- range . }}
  - {{ toYaml . | nindent 4 | trim }}
    labelSelector:
      matchLabels:
        {{- include "tunesmith.selector" (list $root (index $ 1)) | nindent 8 }}
  {{- end }}
{{- end }}
{{- with $values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with $values.priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with $root.Values.images.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end -}}

{{/* A peer of a NetworkPolicy: the pods of a component. Arguments: root context and component. */}}
{{- define "tunesmith.peer" -}}
podSelector:
  matchLabels:
    {{- include "tunesmith.selector" . | nindent 4 }}
{{- end -}}

{{/* Right to read the labels of the served namespaces, by which pools select who may attach. */}}
{{- define "tunesmith.namespaceRules" -}}
- apiGroups: [""]
  resources: [namespaces]
  {{- with .Values.watchNamespaces }}
  resourceNames: {{ toJson . }}
  {{- end }}
  verbs: [list, watch]
{{- end -}}

{{/* Namespaces in which rights are granted: those listed, or one empty name for the whole cluster. */}}
{{- define "tunesmith.scopes" -}}
{{- toJson (.Values.watchNamespaces | default (list "")) -}}
{{- end -}}
